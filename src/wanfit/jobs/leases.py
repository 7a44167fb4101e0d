"""Time that a jump of the clock cannot hurry: what has stood still for so long, as seen from here.

The wall clock of a machine may jump by hours, back or forth, and two machines never agree. So no
lease has an end in the database: it has a count of heartbeats, and whoever reaps remembers when,
by the monotonic clock of his own process, he first saw that count. Unchanged for the whole lease,
it is over. (The rule of Amazon's DynamoDB lock client.) Deadlines and the waits between webhooks
are watched in the same way: from the first sight on, only elapsed seconds count.

The price: a process that has just started has seen nothing yet, and gives every lease its full
time. `liveness.py` shortens that for workers of this machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable


class Stillness:
    """Remembers when each thing was first seen as it is now."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._seen: dict[Hashable, tuple[Hashable, float]] = {}  # by key: version, due moment
        self._lock = threading.Lock()

    def is_over(self, key: Hashable, version: Hashable, after_s: float) -> bool:
        """Whether `after_s` went by since `key` was first seen in this version."""
        now_s = self._monotonic_s()
        with self._lock:
            seen = self._seen.get(key)
            if seen is None or seen[0] != version:
                seen = self._seen[key] = (version, now_s + after_s)
            return now_s >= seen[1]

    def forget_others(self, keys: Iterable[Hashable]) -> None:
        """Drops what is not among `keys`: it is not watched any more."""
        kept = set(keys)
        with self._lock:
            for key in [key for key in self._seen if key not in kept]:
                del self._seen[key]
