"""Why a GPU process ended, as far as the machine tells, and whether the job is to blame.

A process that was killed from outside says nothing about its job, which may try again as often as
attempts last. One that the kernel killed for memory, that crashed, or that hung, does: twice is
enough. SIGKILL alone does not tell the two apart; the kernel's count of kills for memory does.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfit.jobs.job import Failure

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # no program sends them to itself


@dataclass(frozen=True, slots=True)
class Ending:
    """How a GPU process ended under a job."""

    failure: Failure
    blame: bool  # the job is to blame, as far as can be told


def ending_of(
    returncode: int, said: Mapping[str, Any] | None, oom_kills: tuple[int | None, int | None]
) -> Ending:
    """said: the code and message of its last words. oom_kills: counted before and after."""
    if said is not None:
        return Ending(Failure(said["code"], said["message"]), blame=True)
    if returncode >= 0:
        text = f"The GPU process ended by itself with exit code {returncode}"
        return Ending(Failure("worker_crashed", text), blame=True)
    name = _signal_name(-returncode)
    if -returncode == signal.SIGKILL:
        before, after = oom_kills
        if before is None or after is None:
            text = f"The GPU process was killed ({name}), and this machine does not say why"
            return Ending(Failure("worker_killed", text, _MEMORY_HINT), blame=True)
        if after > before:
            text = f"The kernel killed the GPU process ({name}), since memory had run out"
            return Ending(Failure("worker_killed", text, _MEMORY_HINT), blame=True)
    if -returncode in (signal.SIGKILL, *_OUTSIDE):
        text = f"The GPU process was killed from outside ({name})"
        return Ending(Failure("worker_killed", text), blame=False)
    return Ending(Failure("worker_crashed", f"The GPU process crashed ({name})"), blame=True)


_MEMORY_HINT = "Ask for a smaller clip, or give the server less --ram, so that it plans within it"


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory: of this container, else of the machine.

    None where neither is told.
    """
    for path in _counters():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        counts = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
        if counts:
            return counts[0]
    return None


def _counters() -> list[Path]:
    """cgroup 2, cgroup 1, the machine (Documentation/admin-guide/cgroup-v2.rst, memory.events)."""
    try:
        groups = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    own = [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]
    return [
        *(CGROUP / name / "memory.events" for name in own),
        CGROUP / "memory/memory.oom_control",
        PROC / "vmstat",
    ]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
