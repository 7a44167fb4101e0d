"""The device that a plan runs on: held to its budget, and what running out of memory looks like."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from wanfit.engine.weights.depot import Depot
from wanfit.errors import BadOption
from wanfit.plan.amounts import show_bytes

LINK_BYTES, LINK_COPIES = 64 << 20, 8  # ours: 10 ms at PCIe 5, long beside a launch
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, in torch.AcceleratorError.error_code


def torch_device(name: str) -> torch.device:
    """The device "cpu", "cuda" or "cuda:N". Raises BadOption when torch does not see it."""
    chosen = torch.device(name)
    if chosen.type == "cpu":
        return chosen
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = chosen.index or 0
    if index >= count:
        raise BadOption(
            f"device is {name!r}, and torch {torch.__version__} sees {count} CUDA devices",
            hint="Use --device cpu, or install a CUDA build of torch and its driver",
        )
    return torch.device("cuda", index)


def sees_cuda() -> bool:
    """Whether this build of torch can use a GPU here."""
    return bool(torch.cuda.is_available())


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def limit_memory(device: torch.device, allocator_bytes: int) -> None:
    """Lets torch's allocator take at most this; beyond it, it raises instead of taking more."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(1.0, max(0.0, allocator_bytes / total))
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's own error, or that of a kernel or a library in it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    code = getattr(error, "error_code", None)
    return isinstance(error, torch.AcceleratorError) and code == CUDA_OUT_OF_MEMORY


def what_is_held(device: torch.device, depot: Depot) -> str:
    """One line on who holds memory now, for the report of running out of it."""
    host = (
        f"{show_bytes(depot.registered_bytes)} of files registered, ring {depot.ring_bytes} bytes"
    )
    if device.type != "cuda":
        return host
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    others = total - free - ours
    return (
        f"tensors {show_bytes(torch.cuda.memory_allocated(device))}, reserved {show_bytes(ours)},"
        f" others and the CUDA context {show_bytes(others)} of {show_bytes(total)}; {host}"
    )


def measure_link() -> float:
    """Bytes per second from pinned memory to the current GPU, in about a tenth of a second."""
    source = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source, non_blocking=True)  # the first one is slow
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(LINK_COPIES):
        target.copy_(source, non_blocking=True)
    ended.record()
    ended.synchronize()
    return float(LINK_COPIES * LINK_BYTES / (began.elapsed_time(ended) / 1000))


def empty_cache(device: torch.device) -> None:
    """Gives what is held without use back: to the device, cuBLAS' workspaces among it, and to RAM.

    glibc keeps what was freed between other allocations; over clips of many sizes that grows. In
    46 random clips of the demo (CPU, 2026-11-25) resident memory rose to 448 MB without the trim,
    and to 324 MB with it.
    """
    with suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # they are tensors that torch keeps per stream
        torch.cuda.empty_cache()
