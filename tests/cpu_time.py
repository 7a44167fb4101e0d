"""Seconds of computing, for bars on time: the tests share two cores, so the clock says too much."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable


def of_children_s(run: Callable[[], object]) -> float:
    """CPU seconds, user and system, of the processes that `run` starts and waits for."""

    def spent_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before_s = spent_s()
    run()
    return spent_s() - before_s


def of_this_thread_s(run: Callable[[], object]) -> float:
    """CPU seconds of this thread while `run` runs."""
    before_s = time.thread_time()
    run()
    return time.thread_time() - before_s
