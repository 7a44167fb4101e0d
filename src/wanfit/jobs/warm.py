"""The GPU process of one worker: there, warm and ready, or on its way to be again."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable
from pathlib import Path

from wanfit.jobs.endings import ending_of, oom_kills
from wanfit.jobs.process import GpuProcess
from wanfit.jobs.telemetry import Observe, ProcessEnded, WorkerState

log = logging.getLogger(__name__)
START_WAITS_S = (0.0, 1.0, 5.0, 15.0, 30.0)  # ours: before another try of a process that fails


class WarmProcess:
    """start: makes a process. ends: whether the server ends, and nobody needs it any more.

    It has to be used by one thread, which outlives the process.
    """

    def __init__(
        self,
        start: Callable[[], GpuProcess],
        *,
        ready_s: float,
        observe: Observe,
        ends: Callable[[], bool],
    ) -> None:
        self.trouble: WorkerState | None = "starting"  # None: it is ready
        self.restarts = 0
        self.last_end: str | None = None
        self._start = start
        self._ready_s = ready_s
        self._observe = observe
        self._ends = ends
        self.failed_starts = 0  # one after the other
        self._process: GpuProcess | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def device(self) -> str | None:
        process = self._process
        return None if process is None else process.device

    @property
    def rss_bytes(self) -> int | None:
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        except OSError:
            return None
        return int(fields[1]) * mmap.PAGESIZE

    def get(self) -> GpuProcess | None:
        """A process that is ready for a job; None while there is none yet."""
        process = self._process
        if process is not None and process.is_over:
            kills = oom_kills()  # nothing ran, so the count says nothing here
            self.note_end(ending_of(process.wait(), None, (kills, kills)).failure.code)
            self.look()
        elif process is not None:
            return process
        self.trouble = "failing" if self.failed_starts else "starting"
        wait_s = START_WAITS_S[min(self.failed_starts, len(START_WAITS_S) - 1)]
        if nap(wait_s, self._ends):
            return None
        started = self._process = self._start()
        if self._is_ready(started):
            self.failed_starts = 0
            self.trouble = None
            return started
        started.kill()
        self._process = None
        if not self._ends():
            self.failed_starts += 1
            self.last_end = "start_failed"
            log.error("the GPU process does not start:\n%s", started.last_lines())
        return None

    def look(self) -> None:
        """After a job: a process that is over makes room for another one."""
        if self._process is not None and self._process.is_over:
            self._process.wait()
            self._process = None
            self.restarts += 1
            self.trouble = "starting"

    def note_end(self, code: str) -> None:
        """It ended, and should not have."""
        self.last_end = code
        self._observe(ProcessEnded(code))
        if self._process is not None:
            lines = self._process.last_lines()
            log.warning("the GPU process ended (%s); it said last:\n%s", code, lines)

    def close(self) -> None:
        self.trouble = None
        if self._process is not None:
            self._process.close()
        self._process = None

    def _is_ready(self, process: GpuProcess) -> bool:
        until_s = time.monotonic() + self._ready_s
        while not self._ends() and time.monotonic() < until_s:
            news = process.next_news(0.1)
            if news is not None and news.kind == "ready":
                return True
            if news is None and process.is_over:
                return False
        return False


def nap(seconds: float, ends: Callable[[], bool]) -> bool:
    """Sleeps, until the server ends at most; whether it does."""
    until_s = time.monotonic() + seconds
    while not ends() and time.monotonic() < until_s:
        time.sleep(0.1)
    return ends()
