"""What each stage cost: seconds, and the most bytes held at once, on the GPU and on the host.

The caller of the pipeline moves the meter from stage to stage; at every border the peaks are read
and reset. Left out: where inside a stage the time goes (that is a profiler's work).

What is measured:
- `elapsed_s`: wall clock from border to border, with the GPU's queue drained at each border.
- `device_allocated_bytes`: the most that tensors held at once, by torch's caching allocator
  (torch.cuda.max_memory_allocated). None without CUDA.
- `device_reserved_bytes`: the most that the allocator had taken from the driver
  (max_memory_reserved). The CUDA context itself, some hundred MB, is in neither. None without CUDA.
- `host_resident_bytes`: the most resident memory of this process (VmHWM of /proc/self/status):
  anonymous memory, and pages of mapped weight files that were touched. Includes the interpreter and
  torch themselves. The kernel resets the mark at a border when 5 is written to
  /proc/self/clear_refs; where that is not allowed, it is the peak since the process began.
"""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from wanfit.events import Stage

_RESET_PEAK_RESIDENT = "5"  # proc(5), clear_refs, since Linux 4.0


@dataclass(frozen=True, slots=True)
class StageUse:
    """One stage, measured. The module's text says what each number is."""

    stage: Stage
    elapsed_s: float
    host_resident_bytes: int
    device_allocated_bytes: int | None
    device_reserved_bytes: int | None


class Meter:
    """Measures stages that follow one another on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: list[StageUse] = []
        self._stage: Stage | None = None
        self._began_s = 0.0

    def begin(self, stage: Stage) -> None:
        """Ends the stage before, if any, and begins this one."""
        self._end()
        self._reset_peaks()
        self._stage = stage
        self._began_s = time.perf_counter()

    def finish(self) -> tuple[StageUse, ...]:
        """Ends the last stage. All stages, in the order in which they began."""
        self._end()
        return tuple(self._done)

    def _end(self) -> None:
        if self._stage is None:
            return
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
        self._done.append(
            StageUse(
                stage=self._stage,
                elapsed_s=time.perf_counter() - self._began_s,
                host_resident_bytes=_peak_resident_bytes(),
                device_allocated_bytes=(
                    torch.cuda.max_memory_allocated(self._device) if on_cuda else None
                ),
                device_reserved_bytes=(
                    torch.cuda.max_memory_reserved(self._device) if on_cuda else None
                ),
            )
        )
        self._stage = None

    def _reset_peaks(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK_RESIDENT)


def _peak_resident_bytes() -> int:
    """VmHWM; on systems whose /proc has no such line, the peak that getrusage gives."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # the kernel's "kB" are KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def process_age_s() -> float:
    """Seconds since this process began, by the kernel's clock ticks (10 ms)."""
    # proc(5), stat: the name in parentheses may hold anything; starttime is field 22
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
