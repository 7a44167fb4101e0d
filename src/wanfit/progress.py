"""Progress of work that is counted in bytes, shown to a person on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 5.0  # without a terminal: a line so often


class ByteProgress(Protocol):
    """Enter it, then say how far the work is as often as you like."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def show(self, what: str, done_bytes: int, total_bytes: int) -> None: ...


def byte_progress() -> ByteProgress:
    """A bar on a terminal, plain lines otherwise."""
    return _ByteBar() if sys.stderr.isatty() else _ByteLines()


class _ByteLines:
    """A line for each new part of the work, and one now and then while it goes on."""

    def __init__(self) -> None:
        self._began_s = 0.0
        self._began_bytes = 0
        self._said_s = 0.0
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if not self._what:
            self._began_s, self._began_bytes = now_s, done_bytes
        elif what == self._what and now_s - self._said_s < LINE_EVERY_S:
            return
        self._what, self._said_s = what, now_s
        line = f"{what}: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB"
        gained_bytes = done_bytes - self._began_bytes
        if gained_bytes and now_s > self._began_s:
            left_s = (now_s - self._began_s) / gained_bytes * (total_bytes - done_bytes)
            line += f", {left_s:.0f} s left"
        typer.echo(line, err=True)


class _ByteBar:
    """One bar for the whole: what is at work, bytes, speed, and the time that is left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress: Progress = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        if self._task is None:
            # What an earlier run did is not this run's speed, so the bar begins there.
            self._task = self._progress.add_task(what, total=total_bytes, completed=done_bytes)
        self._progress.update(self._task, description=what, completed=done_bytes)
