"""Progress shown to a person on stderr: of a clip by its events, of other work by its bytes."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from wanfit.events import Event, Stage

LINE_EVERY_S = 5.0  # without a terminal: a line at least so often while work goes on,
LINE_EVERY_PART = 0.1  # or after each tenth of a clip's stage,
LINE_AT_MOST_EVERY_S = 1.0  # but not more often than this
MOST_CHARS = 40  # ours: of what a bar is about


class ClipProgress(Protocol):
    """Shows events to a person, on stderr."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def show(self, event: Event) -> None: ...


def clip_progress() -> ClipProgress:
    """A bar on a terminal, plain lines otherwise."""
    return _ClipBar() if sys.stderr.isatty() else _ClipLines()


class _ClipLines:
    """A line as each stage begins, one now and then while its steps go by."""

    def __init__(self) -> None:
        self._stage_began_s = 0.0
        self._said_s = 0.0
        self._said_step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, event: Event) -> None:
        from wanfit.events import Notice, StageBegan, StepDone

        match event:
            case StageBegan(stage=stage, steps=steps):
                self._stage_began_s = self._said_s = time.monotonic()
                self._said_step = 0
                typer.echo(f"{stage}: {steps} steps" if steps else stage, err=True)
            case StepDone(stage=stage, step=step, steps=steps):
                self._step(stage, step, steps)
            case Notice(message=message):
                typer.echo(f"note: {message}", err=True)

    def _step(self, stage: Stage, step: int, steps: int) -> None:
        now_s = time.monotonic()
        silent_s = now_s - self._said_s
        far = step - self._said_step >= LINE_EVERY_PART * steps and silent_s >= LINE_AT_MOST_EVERY_S
        if not far and silent_s < LINE_EVERY_S:
            return
        self._said_s, self._said_step = now_s, step
        left_s = (now_s - self._stage_began_s) / step * (steps - step)
        typer.echo(f"{stage}: step {step} of {steps}, {left_s:.0f} s left", err=True)


class _Bar:
    """One line on the terminal: what is at work, a bar, `columns`, and the time that is left."""

    def __init__(self, *columns: ProgressColumn) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            *columns,
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


class _ClipBar(_Bar):
    """One bar for the stage that runs: its name, steps, and the time that is left."""

    def __init__(self) -> None:
        from rich.progress import MofNCompleteColumn

        super().__init__(MofNCompleteColumn())

    def show(self, event: Event) -> None:
        from wanfit.events import Notice, StageBegan, StepDone

        match event:
            case StageBegan(stage=stage, steps=steps):
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._task = self._progress.add_task(stage, total=steps)
            case StepDone(step=step):
                assert self._task is not None, "a step belongs to a stage"
                self._progress.update(self._task, completed=step)
            case Notice(message=message):
                self._progress.console.print(
                    f"note: {message}", markup=False, highlight=False, soft_wrap=True
                )


class ByteProgress(Protocol):
    """Enter it, then say how far the work is as often as you like.

    Another total is another piece of work: a download, then its conversion.
    """

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
        self._total_bytes = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if total_bytes != self._total_bytes:
            self._began_s, self._began_bytes = now_s, done_bytes
        elif what == self._what and now_s - self._said_s < LINE_EVERY_S:
            return
        self._what, self._said_s, self._total_bytes = what, now_s, total_bytes
        line = f"{what}: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB"
        gained_bytes = done_bytes - self._began_bytes
        if gained_bytes > 0 and now_s > self._began_s:
            bytes_per_s = gained_bytes / (now_s - self._began_s)
            left_s = (total_bytes - done_bytes) / bytes_per_s
            line += f", {bytes_per_s / 1e6:.0f} MB/s, {left_s:.0f} s left"
        typer.echo(line, err=True)


class _ByteBar(_Bar):
    """One bar for the work at hand: what it is, bytes, speed, and the time that is left."""

    def __init__(self) -> None:
        from rich.progress import DownloadColumn, TransferSpeedColumn

        super().__init__(DownloadColumn(), TransferSpeedColumn())
        self._total_bytes = -1

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        if self._task is not None and total_bytes != self._total_bytes:
            self._progress.remove_task(self._task)
            self._task = None
        if self._task is None:
            # What an earlier run did is not this run's speed, so the bar begins there.
            self._task = self._progress.add_task(
                _brief(what), total=total_bytes, completed=done_bytes
            )
            self._total_bytes = total_bytes
        self._progress.update(self._task, description=_brief(what), completed=done_bytes)


def _brief(what: str) -> str:
    """A long name of a file with its middle left out, so that the bar has room."""
    return what if len(what) <= MOST_CHARS else f"{what[:14]}...{what[17 - MOST_CHARS :]}"
