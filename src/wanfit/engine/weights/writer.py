"""Appends units to a file of a store: one thread writes and adds up, one waits for the disk."""

from __future__ import annotations

import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from wanfit.engine.weights.partial import DoneUnit, PartialStore
from wanfit.engine.weights.store import checksum_text

MAX_QUEUED = 16  # ours: pieces that wait to be written; more hide nothing and cost memory
SYNC_BYTES = 256 << 20  # ours: written between two waits for the disk, so lost by a kill at most


class UnitWriter:
    """The caller goes on while pieces are written. Errors of the threads reach it by any call.

    Leaving the `with` waits for the threads; what was written and not synced is not in the journal.
    """

    def __init__(self, partial: PartialStore, name: str, begin: int) -> None:
        """Continues file `name` of the store at byte `begin`."""
        self._partial = partial
        self._name = name
        self._end = begin  # of what was written
        self._crc32 = 0  # of the unit so far
        self._unsynced: list[DoneUnit] = []
        self._unsynced_bytes = 0
        self._done: dict[str, str] = {}
        self._failed = False  # in the middle of a piece: what follows must not be written
        self._queued: deque[Future[None]] = deque()
        self._syncing: Future[None] | None = None
        self._handle = os.open(partial.store / name, os.O_RDWR | os.O_CREAT, 0o666)
        os.lseek(self._handle, begin, os.SEEK_SET)
        self._writing = ThreadPoolExecutor(1, "write")
        self._waiting = ThreadPoolExecutor(1, "sync")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writing.shutdown(cancel_futures=True)
        self._waiting.shutdown(cancel_futures=True)
        os.close(self._handle)

    def write(self, piece: Tensor) -> None:
        """Appends uint8 [...] to the unit; `piece` must not be changed any more."""
        self._submit(self._writing.submit(self._write, piece.numpy().data))

    def end_unit(self, unit: str) -> None:
        self._submit(self._writing.submit(self._end_unit, unit))

    def finish(self) -> dict[str, str]:
        """Waits until all units are on the disk. Returns unit -> checksum."""
        self._submit(self._writing.submit(self._sync))
        while self._queued:
            self._queued.popleft().result()
        if self._syncing:
            self._syncing.result()
        return self._done

    def write_header(self, header: bytes) -> None:
        """After `finish`: the file is whole then, and on the disk."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        _write_all(self._handle, memoryview(header))
        os.fsync(self._handle)

    def _submit(self, future: Future[None]) -> None:
        self._queued.append(future)
        while len(self._queued) > MAX_QUEUED:
            self._queued.popleft().result()

    def _write(self, piece: memoryview) -> None:
        if self._failed:
            return
        self._failed = True
        _write_all(self._handle, piece)
        self._crc32 = zlib.crc32(piece, self._crc32)
        self._end += len(piece)
        self._unsynced_bytes += len(piece)
        self._failed = False

    def _end_unit(self, unit: str) -> None:
        if self._failed:
            return
        checksum = checksum_text(self._crc32)
        self._crc32 = 0
        self._done[unit] = checksum
        self._unsynced.append(DoneUnit(self._name, unit, self._end, checksum))
        if self._unsynced_bytes >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        """Begins to wait for the disk, once the wait before is over: so little is ever dirty."""
        if self._syncing:
            self._syncing.result()
        units, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        self._syncing = self._waiting.submit(self._wait, units)

    def _wait(self, units: list[DoneUnit]) -> None:
        os.fdatasync(self._handle)
        self._partial.record(units)


def _write_all(handle: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(handle, piece) :]
