"""The command line: `wanfit generate` and `wanfit plan`; `commands` has the others.

An edge: it reads arguments and the environment, draws progress, and maps errors to exit codes:

    0 done · 1 our fault · 2 bad request · 3 does not fit: memory or disk
    4 weights missing or broken · 5 interrupted · 6 the hub did not give the model
    7 the store of clips did not take one · 8 a machine that cannot do the work

stdout carries the result only: the path of the clip, or with --json one JSON object (the report,
or {"error": {"code", "message", "hint"}}). Everything else goes to stderr, an error as one line.
This module imports nothing heavy, so that `wanfit --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from wanfit.commands import Interrupted, checkpoints, doctor, keys, say_json, serve, worker
from wanfit.errors import (
    BadRequest,
    DownloadFailed,
    NoRoom,
    StoreFailed,
    WanfitError,
    WeightsError,
)

if TYPE_CHECKING:
    from wanfit.report import Report

EXIT_OUR_FAULT, EXIT_BAD_REQUEST, EXIT_NO_ROOM, EXIT_WEIGHTS = 1, 2, 3, 4
EXIT_INTERRUPTED, EXIT_DOWNLOAD, EXIT_STORE, EXIT_UNFIT = 5, 6, 7, doctor.EXIT_UNFIT
TRACEBACK_VARIABLE = "WANFIT_TRACEBACK"  # 1: an unexpected error prints its traceback

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SIGNAL_S = 2.0  # a second Ctrl-C within this is the same wish, and must not stop the clean-up

# typer carries its own click in some versions, and exports only this leaf of its usage errors.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Runs the Wan 2.2 video models on the GPU and memory you have.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> NoReturn:
    """The `wanfit` console script."""
    _stop_on_signals()
    code = run(sys.argv[1:])
    for number in STOP_SIGNALS:  # all is said and done: a late Ctrl-C must not change the code
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs one command line and gives its exit code. Never raises, but with WANFIT_TRACEBACK=1."""
    as_json = "--json" in arguments
    try:
        command = typer.main.get_command(app)
        code = command.main(args=arguments or ["--help"], prog_name="wanfit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Interrupted:
        _say_error(as_json, "interrupted", "Interrupted, nothing half-written is left")
        return EXIT_INTERRUPTED
    except WanfitError as error:
        _say_error(as_json, error.code, error.message, error.hint)
        return exit_code(error)
    except _UsageError as error:
        _say_error(as_json, "bad_option", error.format_message().rstrip("."), "See wanfit --help")
        return EXIT_BAD_REQUEST
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        _say_error(
            as_json,
            "internal_error",
            f"{type(error).__name__}: {error}",
            f"This is a fault of wanfit; run it again with {TRACEBACK_VARIABLE}=1 and report it",
        )
        return EXIT_OUR_FAULT


def exit_code(error: WanfitError) -> int:
    """The exit code of an error that wanfit raises on purpose."""
    match error:
        case BadRequest():
            return EXIT_BAD_REQUEST
        case NoRoom():
            return EXIT_NO_ROOM
        case WeightsError():
            return EXIT_WEIGHTS
        case DownloadFailed():
            return EXIT_DOWNLOAD
        case StoreFailed():
            return EXIT_STORE
        case _:
            return EXIT_OUR_FAULT


def _say_error(as_json: bool, code: str, message: str, hint: str = "") -> None:
    line = " ".join(f"{message}. {hint}".split() if hint else message.split())
    typer.echo(f"error: {line}", err=True)
    if as_json:
        say_json({"error": {"code": code, "message": message, "hint": hint}})


def _stop_on_signals() -> None:
    """Ctrl-C, `kill` and a closed terminal all end the same way: clean-up, one line, exit code 5.

    A signal that the parent chose to ignore (nohup) stays ignored.
    """
    last_s = -SAME_SIGNAL_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= SAME_SIGNAL_S:
            last_s = now_s
            raise Interrupted

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def _show_version(wanted: bool) -> None:
    if wanted:
        from wanfit.service import version

        typer.echo(f"wanfit {version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Runs the Wan 2.2 video models on the GPU and memory you have."""


def _official_flag(name: str) -> Any:
    """A memory flag of the official script: accepted, and explained once the clip is made."""
    return typer.Option(
        name, help="Of the official script; the planner decides, and says what it did instead."
    )


@app.command()
def generate(  # noqa: PLR0913  one parameter per option is how typer reads a command line
    prompt: Annotated[str, typer.Argument(help="What the clip shows.", show_default=False)],
    model: Annotated[str, typer.Option(help="Which model; see wanfit models.")] = "demo",
    image: Annotated[str | None, typer.Option(help="First frame: an image file.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4n + 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt, for both experts.")
    ] = None,
    guidance_high: Annotated[
        float | None, typer.Option(help="The same for the high-noise expert.")
    ] = None,
    guidance_low: Annotated[
        float | None, typer.Option(help="The same for the low-noise expert.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    shift: Annotated[float | None, typer.Option(help="Time shift of the schedule.")] = None,
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++ or euler.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same clip; -1: random.")] = None,
    precision: Annotated[
        str, typer.Option(help="auto (bf16 on CUDA, fp32 on the CPU), fp32, bf16 or fp8.")
    ] = "auto",
    vram: Annotated[
        str | None, typer.Option(help="The most GPU memory to hold, as in 12GiB.", metavar="BYTES")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="The most RAM to hold, as in 16GiB.", metavar="BYTES")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="A store, a model directory of any layout, or a file in one."
            " Default: the best that wanfit models shows.",
            metavar="PATH",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="A .mp4, .gif or .npy file, or a directory for PNG frames."
            " Default: outputs/MODEL-PROMPT-SEED.mp4, never one that exists."
        ),
    ] = None,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="Also write eight frames as one PNG beside it.")
    ] = False,
    offload_model: Annotated[bool | None, _official_flag("--offload-model")] = None,
    t5_cpu: Annotated[bool | None, _official_flag("--t5-cpu")] = None,
    convert_model_dtype: Annotated[bool | None, _official_flag("--convert-model-dtype")] = None,
    init_on_cpu: Annotated[bool | None, _official_flag("--init-on-cpu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a clip from PROMPT. Options that are not given take the model's official defaults."""
    from wanfit import service
    from wanfit.progress import clip_progress

    options: dict[str, Any] = {
        "size": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance": guidance,
        "guidance_high": guidance_high,
        "guidance_low": guidance_low,
        "negative_prompt": negative_prompt,
        "shift": shift,
        "solver": solver,
        "seed": seed,
    }
    flags: dict[str, Any] = {
        "offload_model": offload_model,
        "t5_cpu": t5_cpu,
        "convert_model_dtype": convert_model_dtype,
        "init_on_cpu": init_on_cpu,
    }
    with clip_progress() as progress:
        report = service.generate(
            prompt,
            model=model,
            image=image,
            weights=weights,
            device=device,
            precision=precision,
            vram=vram,
            ram=ram,
            output=output,
            contact_sheet=contact_sheet,
            on_event=progress.show,
            **options,
            **flags,
        )
    if as_json:
        say_json(report.to_json())
    else:
        if any(flag is not None for flag in flags.values()):
            for note in report.plan.notes:
                typer.echo(f"note: {note}", err=True)
        typer.echo(_summary(report), err=True)
        typer.echo(report.output)


def _summary(report: Report) -> str:
    settings = report.settings
    sheet = f"; contact sheet {report.contact_sheet}" if report.contact_sheet else ""
    return (
        f"{report.num_frames} frames of {settings['width']}x{settings['height']} px at"
        f" {settings['fps']} fps, seed {settings['seed']}, {report.total_s:.1f} s on"
        f" {report.device} in {report.precision}{sheet}"
    )


@app.command()
def plan(  # noqa: PLR0913  as generate
    model: Annotated[str, typer.Option(help="Which model; see wanfit models.")] = "demo",
    image: Annotated[str | None, typer.Option(help="First frame: an image file.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4n + 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="1 needs half the work.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Of the high-noise expert.")] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Of the low-noise expert.")] = None,
    shift: Annotated[float | None, typer.Option(help="Time shift of the schedule.")] = None,
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++ or euler.")] = None,
    precision: Annotated[
        str, typer.Option(help="auto (bf16 on CUDA, fp32 on the CPU), fp32, bf16 or fp8.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpu: Annotated[
        str | None,
        typer.Option(help="A card that need not be here, such as rtx5090; all: every known one."),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="GPU memory to keep to, as in 12GiB.")] = None,
    ram: Annotated[str | None, typer.Option(help="RAM to keep to, as in 117GB.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="A machine described as JSON.", metavar="FILE")
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(help="With --gpu all: JSON or CSV, card to cost per hour.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say whether a clip fits a machine, how it would run, and how long it takes."""
    from wanfit.plan import command

    options: dict[str, Any] = {
        "size": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance": guidance,
        "guidance_high": guidance_high,
        "guidance_low": guidance_low,
        "shift": shift,
        "solver": solver,
    }
    asked = command.ask(
        model,
        _image_size(image),
        options,
        precision=precision,
        device=device,
        vram=vram,
        ram=ram,
    )
    if gpu == "all":
        offers = command.plan_all(asked, price)
        if as_json:
            say_json(command.offers_json(offers))
        else:
            command.print_offers(asked, offers, priced=price is not None)
        if not any(offer.plan for offer in offers):
            raise typer.Exit(EXIT_NO_ROOM)
        return
    place = command.machine_for(asked, gpu, machine)
    made = command.plan_one(asked, place)
    if as_json:
        say_json(command.plan_json(made, place))
    else:
        command.print_plan(made, place)


def _image_size(image: str | None) -> tuple[int, int] | None:
    """(width, height) of an image file in px."""
    if image is None:
        return None
    from wanfit.media import read_image

    return read_image(image).size


app.command()(checkpoints.models)
app.command()(checkpoints.pull)
app.command()(checkpoints.convert)
app.command()(serve.serve)
app.command()(doctor.doctor)
app.add_typer(keys.app, name="keys")
app.add_typer(worker.app, name="worker")
