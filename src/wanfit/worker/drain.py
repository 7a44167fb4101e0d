"""The end of a worker that is told to stop, without a job that was delivered and then forgotten.

The SDK stops looking for jobs at SIGTERM, but the request for one that is under way may still be
answered, and a job that comes so is dropped: the SDK ends with it in its queue. So its handler of
the signal is put off: the worker takes what comes with that request, makes it, and ends when the
SDK comes to ask for more. Between two requests the SDK asks `Drain.modifier` how many jobs it may
hold, which is where we hear of it. A second signal ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

log = logging.getLogger("wanfit.worker")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Drained(Exception):
    """Raised out of the SDK's loop when nothing is left to do."""


class Drain:
    """concurrency: jobs to hold at once. opened: called in the SDK's loop before its first job.

    held: ids of the jobs that the handler has.
    """

    def __init__(
        self, concurrency: int, opened: Callable[[], None], held: Callable[[], frozenset[str]]
    ) -> None:
        self._concurrency = concurrency
        self._opened = opened
        self._held = held
        self._signals = 0
        self._is_set = self._is_said = False

    @property
    def is_draining(self) -> bool:
        return self._signals > 0

    def modifier(self, current: int) -> int:
        """How many jobs the SDK may hold. Raises Drained."""
        if not self._is_set:
            self._is_set = True
            for number in SIGNALS:  # the SDK has set its own just before
                signal.signal(number, self._told)
            self._opened()
        if not self.is_draining:
            return self._concurrency
        if not self._is_said:
            self._is_said = True
            log.info("told to stop: what runs is made to its end, and no more is asked for")
        delivered = _delivered()
        if not delivered:
            raise Drained
        # 0 asks for no more, and would leave alone what waits in the SDK's own queue.
        return 0 if delivered <= self._held() else self._concurrency

    def _told(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            _end_at_once()


def _delivered() -> frozenset[str]:
    """Ids of the jobs that the SDK has taken and not answered yet."""
    from runpod.serverless.modules.worker_state import (  # type: ignore[import-untyped]
        JobsProgress,
    )

    return frozenset(str(job) for job in JobsProgress())


def _end_at_once() -> NoReturn:
    """The lease in the job store tells the next worker."""
    os._exit(128 + signal.SIGTERM)
