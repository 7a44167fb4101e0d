"""`wanfit doctor`: whether this machine can do the work, and what to change if not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from wanfit.commands import say_json

if TYPE_CHECKING:
    from wanfit.doctor import Diagnosis
    from wanfit.settings import Settings

EXIT_UNFIT = 8
MARKS = {"ok": "ok", "note": "note", "bad": "BAD"}


def doctor(
    for_worker: Annotated[
        bool,
        typer.Option(
            "--for-worker",
            help="Ask for what a worker needs: a GPU (unless WANFIT_DEVICE=cpu) and WANFIT_MODEL.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at GPU, driver, torch, RAM, disk and models, and say what to change.

    Exit code 0: fit for the work; 8: not.
    """
    from wanfit.doctor import examine
    from wanfit.errors import WanfitError
    from wanfit.settings import Settings, read_settings

    settings, wrong = Settings(), None
    try:
        settings = _worker_settings() if for_worker else read_settings()
    except WanfitError as error:
        wrong = error
    found = examine(settings, for_worker=for_worker, with_torch=wrong is None)
    if wrong is not None:
        found = _with_wrong(found, wrong)
    if as_json:
        say_json(found.to_json())
    else:
        _print(found)
    if not found.is_fit:
        raise typer.Exit(EXIT_UNFIT)


def _worker_settings() -> Settings:
    from wanfit.worker.settings import read_worker_settings

    return read_worker_settings().server


def _with_wrong(found: Diagnosis, wrong: Exception) -> Diagnosis:
    from dataclasses import replace

    from wanfit.doctor.checks import bad_setting
    from wanfit.errors import WanfitError

    assert isinstance(wrong, WanfitError)
    return replace(found, checks=(bad_setting(wrong), *found.checks))


def _print(found: Diagnosis) -> None:
    for check in found.checks:
        typer.echo(f"{MARKS[check.status]:5} {check.name:9} {check.found}")
        if check.change:
            typer.echo(f"{'':15} -> {check.change}")
    typer.echo("models:")
    for one in found.models:
        typer.echo(f"{'':5} {one.spec.name:9} {one.state}; {one.answer.line}")
