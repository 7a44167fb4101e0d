"""`wanfit keys`: API keys of `wanfit serve` on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanfit.commands import say_json

if TYPE_CHECKING:
    from wanfit.serve.keys import Key, KeyFile
    from wanfit.settings import Limits, Settings

app = typer.Typer(help="API keys of wanfit serve.", no_args_is_help=True)
_DATA = typer.Option(help="Directory of the server, as in wanfit serve.", metavar="DIRECTORY")
_JSON = typer.Option("--json", help="Print JSON.")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who will use it.", show_default=False)],
    requests_per_second: Annotated[float | None, typer.Option(min=0.01)] = None,
    jobs_per_minute: Annotated[float | None, typer.Option(min=0.01)] = None,
    max_queued: Annotated[int | None, typer.Option(help="Jobs that may wait.", min=1)] = None,
    max_work: Annotated[
        int | None, typer.Option(help="Largest job: width x height x frames x steps.", min=1)
    ] = None,
    data: Annotated[str | None, _DATA] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Make a key and print it, once: only its hash is kept. Limits not given are the server's."""
    settings = _settings(data)
    limits = _limits(
        settings.limits,
        requests_per_s=requests_per_second,
        jobs_per_minute=jobs_per_minute,
        max_queued=max_queued,
        max_work=max_work,
    )
    text, key = _file(settings).add(name, limits)
    if as_json:
        say_json({"key": text, **_described(key)})
    else:
        typer.echo(f"{key.id}: keep this key, it is not shown again", err=True)
        typer.echo(text)


@app.command("list")
def list_keys(
    data: Annotated[str | None, _DATA] = None, as_json: Annotated[bool, _JSON] = False
) -> None:
    """Show the keys: names, limits, and which are revoked."""
    keys = _file(_settings(data)).read()
    if as_json:
        say_json({"keys": [_described(key) for key in keys]})
        return
    for key in keys:
        limits = key.limits
        state = "live" if key.revoked_s is None else "revoked"
        typer.echo(
            f"{key.id}  {state:7}  {key.name}  {limits.requests_per_s:g} requests/s,"
            f" {limits.jobs_per_minute:g} jobs/min, {limits.max_queued} queued,"
            f" work {limits.max_work or 'unlimited'}"
        )


@app.command()
def revoke(
    which: Annotated[str, typer.Argument(help="Id or name.", show_default=False)],
    data: Annotated[str | None, _DATA] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Refuse a key from now on; a running server hears of it at its next request."""
    key = _file(_settings(data)).revoke(which)
    if as_json:
        say_json(_described(key))
    else:
        typer.echo(f"{key.id} ({key.name}) is revoked")


@app.command()
def webhooks(data: Annotated[str | None, _DATA] = None) -> None:
    """Print the secret that webhooks are signed with, for those who receive them."""
    from wanfit.serve.links import webhook_secret

    typer.echo(webhook_secret(_settings(data)).text)


def _settings(data: str | None) -> Settings:
    from wanfit.settings import read_settings

    settings = read_settings()
    return settings if data is None else replace(settings, data=Path(data).expanduser())


def _file(settings: Settings) -> KeyFile:
    from wanfit.serve.keys import KeyFile

    return KeyFile(settings.keys_file)


def _limits(limits: Limits, **given: Any) -> Limits:
    return replace(limits, **{name: value for name, value in given.items() if value is not None})


def _described(key: Key) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(key)
    del fields["sha256"]
    return fields
