"""`wanfit worker runpod`: RunPod's jobs, made on this machine."""

from __future__ import annotations

import gc

import typer

from wanfit.commands import Interrupted

app = typer.Typer(help="Workers of platforms.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Workers of platforms."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def runpod() -> None:
    """Take jobs from a RunPod endpoint. See docs/runpod.md.

    Settings are variables of the environment; options are the SDK's own: --test_input JSON makes
    one job and ends, --rp_serve_api serves on localhost, --rp_log_level DEBUG logs more.
    """
    gc.disable()  # as in `serve`: what is imported now stays for good
    from wanfit.serve.log import start_log
    from wanfit.worker.run import run
    from wanfit.worker.settings import read_worker_settings

    gc.enable()
    start_log()
    try:
        run(read_worker_settings())
    except Interrupted:
        return
