"""`wanfit serve`: an HTTP server on this machine."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wanfit.commands import Interrupted


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; any but loopback needs an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", min=0)] = None,
    data: Annotated[
        str | None, typer.Option(help="Directory of jobs, clips and keys.", metavar="DIRECTORY")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of a request that names none; see wanfit models.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    vram: Annotated[
        str | None, typer.Option(help="The most GPU memory to hold.", metavar="BYTES")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="The most RAM to hold.", metavar="BYTES")] = None,
) -> None:
    """Serve videos over HTTP: as RunPod and OpenAI do, and in our own way. See docs/serving.md.

    Every option is also a variable (WANFIT_HOST, ...), and there are more variables than options.
    """
    gc.disable()  # what is imported now stays for good: looking at it costs a tenth of the start
    from wanfit.plan.command import read_budget
    from wanfit.serve.log import start_log
    from wanfit.serve.run import serve as run
    from wanfit.settings import read_settings

    gc.freeze()
    gc.enable()
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "data": None if data is None else Path(data),
        "model": model,
        "device": device,
        "vram_bytes": read_budget(vram, "--vram"),
        "ram_bytes": read_budget(ram, "--ram"),
    }
    settings = replace(
        read_settings(), **{name: value for name, value in given.items() if value is not None}
    )
    start_log()
    try:
        run(settings)
    except Interrupted:
        return  # the signal came before the server could take it, or as it ended
