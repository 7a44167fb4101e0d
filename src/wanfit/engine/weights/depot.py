"""What this process holds of weight files: mappings, pages registered with CUDA, a pinned ring.

A registered range of a mapping is the page cache itself, made known to CUDA: the GPU copies from
it directly and a second process shares it. Registered pages cannot be reclaimed, and releasing
them waits for the GPU, so nothing is unregistered while a job runs: `release` is for after it.
The ring is a few pinned buffers for everything that is not registered.

Measured on one H200 (probes, driver 580): registering a warm mapping 25 GB/s, copying from it
53 GB/s; pinning a copy instead takes 24 s for 28 GB.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.lanes import Mark
from wanfit.engine.weights.verify import IdleCheck
from wanfit.errors import WeightsBroken
from wanfit.plan.plan import Ring
from wanfit.plan.weights import align

if TYPE_CHECKING:
    from wanfit.engine.preview import Colours

PAGE_BYTES = mmap.PAGESIZE
DIRECT_BYTES = 4096  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
_REGISTER_PORTABLE, _REGISTER_READ_ONLY = 0x01, 0x08  # cudaHostRegisterPortable, ...ReadOnly


class Span(NamedTuple):
    """A run of bytes of a file."""

    start: int
    stop: int


class MappedFile:
    """A weight file, mapped for reading; `bytes` is the mapping as a tensor, never a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registered: list[Span] = []  # page-aligned, disjoint, in no order
        self.direct: int | None = None  # a descriptor that reads around the page cache, once opened
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._map = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise WeightsBroken(f"{path} cannot be mapped: {error}") from None
        with warnings.catch_warnings():
            # torch warns that nobody must write to it, and nobody does.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def missing(self, start: int, stop: int) -> list[Span]:
        """The page-aligned parts of a range that are not registered yet."""
        at = start // PAGE_BYTES * PAGE_BYTES
        end = align(stop, PAGE_BYTES)
        gaps = []
        for span in sorted(self.registered):
            if span.stop <= at or span.start >= end:
                continue
            if span.start > at:
                gaps.append(Span(at, span.start))
            at = span.stop
        if at < end:
            gaps.append(Span(at, end))
        return gaps

    def cut(self, start: int, stop: int) -> Iterator[Span]:
        """The range, cut where one registration ends and the next begins: a copy may not span."""
        for span in sorted(self.registered):
            if span.stop > start and span.start < stop:
                yield Span(max(start, span.start), min(stop, span.stop))

    def forget(self, start: int, stop: int) -> None:
        """Lets go of the pages of a range; they stay in the page cache, and are mapped on need."""
        at, end = start // PAGE_BYTES * PAGE_BYTES, min(align(stop, PAGE_BYTES), len(self._map))
        self._map.madvise(mmap.MADV_DONTNEED, at, end - at)

    def close(self) -> None:
        del self.bytes
        with suppress(BufferError):  # a view that somebody still holds keeps the mapping alive
            self._map.close()
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)


class RingBuffer:
    """One pinned buffer; `copied` ends the last copy out of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # uint8, its address a multiple of DIRECT_BYTES
        self.memory = memoryview(tensor.numpy())  # type: ignore[arg-type]  # it has a buffer
        self.copied: Mark | None = None

    def wait(self) -> None:
        """Until the buffer may be written. For a reader thread; nothing else waits on the host."""
        if self.copied is not None:
            self.copied.synchronize()


class Depot:
    """The mappings, registrations and ring of one process; used by one job at a time.

    check_idle: between jobs, the store of the last one is read and held against its checksums.
    """

    def __init__(self, device: torch.device, *, check_idle: bool = False) -> None:
        self.device = device
        self.notices: list[str] = []
        self.colours: dict[Path, Colours] = {}  # of the autoencoder in a file: see engine/preview
        self._check_idle = check_idle
        self._check: IdleCheck | None = None
        self._checked: Path | None = None
        self._files: dict[Path, MappedFile] = {}
        self._ring: list[RingBuffer] = []
        self._ring_map: mmap.mmap | None = None
        self._ring_pinned = False
        self._refused = False
        self._refused_direct = False

    @property
    def num_files(self) -> int:
        """Files that are mapped."""
        return len(self._files)

    @property
    def registered_bytes(self) -> int:
        """Bytes of mapped files that CUDA holds and the kernel cannot reclaim."""
        spans = (span for file in self._files.values() for span in file.registered)
        return sum(span.stop - span.start for span in spans)

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring's buffers."""
        return len(self._ring_map) if self._ring_map is not None else 0

    def file(self, path: Path) -> MappedFile:
        """The mapping of a file, made at its first use. Raises WeightsBroken."""
        if path not in self._files:
            self._files[path] = MappedFile(path)
        return self._files[path]

    def direct_descriptor(self, path: Path) -> int | None:
        """A descriptor that reads around the page cache.

        None where the file system refuses that, as tmpfs does; a notice says so once.
        """
        file = self.file(path)
        if file.direct is None and not self._refused_direct:
            try:
                file.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                self._refused_direct = True
                self.notices.append(
                    f"{path.name} cannot be read around the page cache ({error.strerror})"
                )
        return file.direct

    def register(self, path: Path, start: int, stop: int) -> bool:
        """Registers a range of a file with CUDA; reads what is not in the page cache yet.

        False when the driver or the file system refuses, which it then does for all: a notice
        says so once, and the bytes have to go through the ring.
        """
        if self._refused:
            return False
        file = self.file(path)
        for span in file.missing(start, stop):
            address = file.bytes.data_ptr() + span.start
            error = self._register(address, span.stop - span.start, _REGISTER_READ_ONLY)
            if error:
                self._refused = True
                self.notices.append(
                    f"CUDA does not register {path.name} ({error}), so weights go through a ring"
                )
                return False
            file.registered.append(span)
        return True

    def ring(self, plan: Ring) -> list[RingBuffer]:
        """The ring as planned; one of another size is given back first."""
        buffer_bytes = align(plan.piece_bytes, DIRECT_BYTES) + 2 * DIRECT_BYTES
        total = plan.num_pieces * buffer_bytes
        if self.ring_bytes != total:
            self._release_ring()
            self._ring_map = mmap.mmap(-1, total)
            whole = torch.frombuffer(self._ring_map, dtype=torch.uint8)
            error = self._register(whole.data_ptr(), total, _REGISTER_PORTABLE)
            self._ring_pinned = not error
            if error:
                self.notices.append(
                    f"CUDA does not pin {total} bytes for the ring ({error}); copies are slow"
                )
            self._ring = [RingBuffer(part) for part in whole.split(buffer_bytes)]
        return self._ring

    @contextmanager
    def use(self, files: ModelFiles) -> Iterator[None]:
        """A job runs with these files: others are given back first, and the idle check waits.

        Raises the WeightsBroken that the check found since the last job.
        """
        for path in [path for path in self._files if not path.is_relative_to(files.path)]:
            self._release_file(self._files.pop(path))
        if self._checked != files.path:
            self._stop_check()
        if self._check is not None:
            self._check.pause()
            if self._check.broken is not None:
                raise self._check.broken
        try:
            yield
        finally:
            if self._check_idle and files.units:
                self._checked = files.path
                self._check = self._check or IdleCheck(files)
                self._check.resume()

    def release(self) -> None:
        """Gives everything back. Waits for the GPU; nobody may use a mapping any more."""
        self._stop_check()
        while self._files:
            self._release_file(self._files.popitem()[1])
        self._release_ring()

    def _stop_check(self) -> None:
        if self._check is not None:
            self._check.stop()
        self._check = self._checked = None

    def _release_file(self, file: MappedFile) -> None:
        for span in file.registered:
            self._unregister(file.bytes.data_ptr() + span.start)
        file.registered.clear()
        file.close()

    def _release_ring(self) -> None:
        if self._ring_map is None:
            return
        if self._ring_pinned:
            self._unregister(self._ring[0].tensor.data_ptr())
        for buffer in self._ring:
            buffer.memory.release()
        self._ring.clear()
        with suppress(BufferError):  # the garbage collector may still hold a view
            self._ring_map.close()
        self._ring_map, self._ring_pinned = None, False

    def _register(self, address: int, num_bytes: int, flags: int) -> str:
        """The empty string, or what CUDA answered. Without CUDA there is nobody to tell."""
        if self.device.type != "cuda":
            return ""
        cudart: Any = torch.cuda.cudart()
        result = cudart.cudaHostRegister(address, num_bytes, flags)
        if int(result) == 0:
            return ""
        # The runtime keeps a refusal as its last error, and the next kernel would report it.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return str(cudart.cudaGetErrorString(result))

    def _unregister(self, address: int) -> None:
        if self.device.type == "cuda":
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(address)
