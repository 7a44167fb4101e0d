"""What the supervisor tells those who count: observations as they come, and how the workers are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wanfit.jobs.job import Job

WorkerState = Literal[
    "starting",  # the GPU process is warming up
    "idle",
    "busy",  # a clip is being made
    "keeping",  # its files are being put away
    "no_room",  # the disk is full: no job is taken until there is room
    "failing",  # the GPU process does not start; it is tried again and again
    "stopped",
]


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job has its final state. Its report has seconds and bytes per stage, planned and measured.

    waited_s: from acceptance to the start of its last attempt. ran_s: from there to the end.
    """

    job: Job
    waited_s: float | None
    ran_s: float | None


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt ended without a final state: the job is in the queue again."""

    job: Job
    why: str  # a code of Failure, or "drained", "no_room", "not_kept", "stale"


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage of an attempt is over."""

    model: str
    stage: str
    elapsed_s: float
    steps: int | None


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A GPU process is gone that should have gone on."""

    code: str  # of Failure


Observation = JobEnded | AttemptEnded | StageEnded | ProcessEnded
Observe = Callable[[Observation], None]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, now."""

    slot: int
    state: WorkerState
    pid: int | None  # of the GPU process
    device: str | None
    job_id: str | None
    restarts: int  # GPU processes that had to be replaced
    last_end: str | None  # why the last of them ended
    rss_bytes: int | None  # of the GPU process
    failed_starts: int = 0  # of it, one after the other, up to now
