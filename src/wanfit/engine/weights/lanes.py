"""The two queues of a device: one computes, one copies; marks order them without a host wait.

On CUDA they are streams and events. On the CPU a copy is over when it returns, so there is nothing
to order, and the same streaming code runs there.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None: ...


class Lanes(Protocol):
    """What the streamer asks of a device."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy on the copying lane."""

    def copied(self) -> Mark:
        """The end of all copies queued so far."""

    def computed(self) -> Mark:
        """The end of all work that the calling thread queued on its computing lane so far."""

    def copy_after(self, mark: Mark) -> None:
        """Copies queued from now on begin after the mark."""

    def compute_after(self, mark: Mark, asked_s: float) -> None:
        """Work queued from now on begins after the mark. Counts how long it had to wait.

        asked_s: time.perf_counter() when the host asked; it may have waited too.
        """

    def waited_s(self) -> float:
        """Seconds that computing stood still for copies so far. Waits until all work is done."""

    def drain(self) -> None:
        """Waits until all copies are done."""


class CudaLanes:
    """The current stream computes, a stream of our own copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        event: torch.cuda.Event = self._copying.record_event()
        return event

    def computed(self) -> Mark:
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def copy_after(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._copying.wait_event(mark)

    def compute_after(self, mark: Mark, asked_s: float) -> None:
        assert isinstance(mark, torch.cuda.Event)
        stream = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(mark)
        after.record(stream)
        self._waits.append((before, after))

    def waited_s(self) -> float:
        torch.cuda.synchronize(self._device)
        waited_ms = [float(before.elapsed_time(after)) for before, after in self._waits]
        return sum(waited_ms) / 1000

    def drain(self) -> None:
        self._copying.synchronize()


class _Now:
    """A mark for work that is over when it returns."""

    def synchronize(self) -> None:
        pass


class HostLanes:
    """The CPU: whoever copies is done when `copy` returns."""

    def __init__(self) -> None:
        self._waited_s = 0.0

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def copied(self) -> Mark:
        return _Now()

    def computed(self) -> Mark:
        return _Now()

    def copy_after(self, mark: Mark) -> None:
        pass

    def compute_after(self, mark: Mark, asked_s: float) -> None:
        self._waited_s += time.perf_counter() - asked_s

    def waited_s(self) -> float:
        return self._waited_s

    def drain(self) -> None:
        pass


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else HostLanes()
