"""Commands of the command line that have a file of their own, and what all commands share.

stdout carries a command's result only, everything else goes to stderr; `cli` maps errors to exit
codes. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
from typing import Any

import typer


class Interrupted(BaseException):
    """A signal asked us to stop. Not KeyboardInterrupt, which typer turns into exit code 130."""


def say_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2))
