"""Whether the bytes of a store are still those that were written, unit by unit.

Opening a store checks its headers. This reads all of it against the checksums: at the speed of the
disk, in one small buffer, and in the background while no job runs (`IdleCheck`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self

from wanfit.engine.weights.files import ModelFiles, StoredUnit
from wanfit.engine.weights.store import checksum_text
from wanfit.errors import WeightsBroken

PIECE_BYTES = 4 << 20  # ours: a pause is heard after so many bytes, a few milliseconds

# include/uapi/linux/ioprio.h: ioprio_set(IOPRIO_WHO_PROCESS, 0: this thread, class << 13)
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the number of the system call
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13  # served when nobody else asks the disk


def verify_units(
    files: ModelFiles, between: Callable[[], None] | None = None
) -> Iterator[StoredUnit]:
    """Yields each unit of a store once its bytes were found to be right; the caller may stop.

    between: called before every `PIECE_BYTES`; it may wait, or raise to stop. A directory in
    diffusers layout has no units, so nothing is checked. Raises WeightsBroken, naming file and
    unit.
    """
    buffer = bytearray(PIECE_BYTES)
    for unit in files.units:
        found = _checksum(unit, buffer, between or _go_on)
        if found != unit.checksum:
            raise WeightsBroken(
                f"{unit.file} is damaged in {unit.name}: the checksum of its {unit.num_bytes} bytes"
                f" is {found} instead of {unit.checksum}",
                hint="Convert the model again, or copy the file again",
            )
        yield unit


class IdleCheck:
    """Goes once through a store in a thread of low priority, while it is told that nothing runs.

    Begins paused. The first unit that is damaged ends it: `broken` is set and `on_broken` called,
    in the thread.
    """

    def __init__(
        self, files: ModelFiles, on_broken: Callable[[WeightsBroken], None] | None = None
    ) -> None:
        self.broken: WeightsBroken | None = None
        self.num_checked = 0  # units found to be right
        self._files = files
        self._on_broken = on_broken
        self._idle = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="idle-check", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def done(self) -> bool:
        """Whether the thread is over: all units checked, one broken, or stopped."""
        return not self._thread.is_alive()

    def resume(self) -> None:
        """No job runs: read on."""
        self._idle.set()

    def pause(self) -> None:
        """A job begins: read no more than the piece at hand."""
        self._idle.clear()

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stopped = True
        self._idle.set()
        self._thread.join()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until `done`; whether it is."""
        self._thread.join(timeout_s)
        return self.done

    def _run(self) -> None:
        _lower_priority()
        try:
            for _ in verify_units(self._files, self._between):
                self.num_checked += 1
        except _Stopped:
            pass
        except WeightsBroken as error:
            self.broken = error
            if self._on_broken:
                self._on_broken(error)

    def _between(self) -> None:
        self._idle.wait()
        if self._stopped:
            raise _Stopped


class _Stopped(Exception):
    """The check was told to end."""


def _go_on() -> None:
    pass


def _checksum(unit: StoredUnit, buffer: bytearray, between: Callable[[], None]) -> str:
    crc32, done = 0, 0
    view = memoryview(buffer)
    try:
        handle = os.open(unit.file, os.O_RDONLY)
        try:
            while done < unit.num_bytes:
                between()
                piece = view[: min(len(buffer), unit.num_bytes - done)]
                count = os.preadv(handle, [piece], unit.offset + done)
                if count == 0:
                    break
                crc32 = zlib.crc32(piece[:count], crc32)
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise WeightsBroken(
            f"{unit.file} cannot be read in {unit.name}: {error.strerror}"
        ) from None
    if done < unit.num_bytes:
        raise WeightsBroken(
            f"{unit.file} ends in {unit.name}, after {done} of its {unit.num_bytes} bytes"
        )
    return checksum_text(crc32)


def _lower_priority() -> None:
    """Of this thread, for the processor and for the disk, as far as the system has such a thing."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
