"""How much one caller may ask for: requests and jobs in a time, by token buckets."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST_S = 10.0  # ours: what a caller saved up while it was silent
MAX_CALLERS = 10_000  # ours: buckets kept; the ones that are full are forgotten first


class Buckets:
    """One bucket for each caller, filled at the caller's own rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}  # caller -> (tokens, moment)

    def take(self, caller: str, rate_per_s: float) -> float:
        """Takes one token; gives 0, or the seconds after which there is one again."""
        now_s = self._clock()
        most = max(1.0, rate_per_s * BURST_S)
        tokens, then_s = self._levels.get(caller, (most, now_s))
        tokens = min(most, tokens + max(0.0, now_s - then_s) * rate_per_s)
        if tokens < 1:
            self._levels[caller] = tokens, now_s
            return (1 - tokens) / rate_per_s
        self._levels[caller] = tokens - 1, now_s
        if len(self._levels) > MAX_CALLERS:
            self._forget(now_s)
        return 0.0

    def _forget(self, now_s: float) -> None:
        """Drops the half that was silent the longest."""
        oldest = sorted(self._levels, key=lambda caller: self._levels[caller][1])
        for caller in oldest[: len(oldest) // 2]:
            del self._levels[caller]
