"""Labelled points of the way of a job, at which the crash tests end or stop the process.

In a server nothing is set, and a point costs one comparison. Nothing reads the environment.
"""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def crash_point(label: str) -> None:
    """Here a test may end the process."""
    if _hook is not None:
        _hook(label)


def set_crash_hook(hook: Callable[[str], None] | None) -> None:
    """Calls `hook` with the label of every point that is passed; None: no more."""
    global _hook
    _hook = hook
