"""One file from the hub to the disk: ranges over several connections, written in order.

The file grows from its begin on under another name, so what is there is right up to its end and a
killed download continues at its length. Length and checksum are those that the hub lists, or the
file never gets its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from wanfit.errors import BadDownload, BadOutput, HubFailed
from wanfit.pull.hub import RemoteFile, Repository, TryAgain, host

SEGMENT_BYTES = 16 << 20  # ours: of one request; at most CONNECTIONS + 1 of them are in memory
CONNECTIONS = 8  # ours: one connection rarely fills a line; huggingface_hub's xet opens as many
TRIES = 6  # ours: without progress between them; the waits add up to half a minute
PROGRESS_BYTES = 1 << 20  # ours: fewer between two failures are none
FIRST_WAIT_S, MOST_WAIT_S = 1.0, 16.0  # ours: doubled each time, where the server says nothing
MOST_ASKED_WAIT_S = 600.0  # ours: twice the hub's window of five minutes; longer: an error says so

OnBytes = Callable[[int], None]


class Stopped(Exception):
    """The transfer was told to end; for its own threads only."""


class Patience:
    """Counts failures in a row of one request, and waits between them."""

    def __init__(self, what: str, stopped: threading.Event | None = None) -> None:
        self._what = what
        self._stopped = stopped or threading.Event()
        self._failures = 0
        self._came_bytes = 0

    def progressed(self, num_bytes: int) -> None:
        """Something came: if it is enough, what failed before counts no more."""
        self._came_bytes += num_bytes
        if self._came_bytes >= PROGRESS_BYTES:
            self._failures = self._came_bytes = 0

    def wait(self, failure: TryAgain) -> None:
        """Waits as the server asked or a little longer each time. Raises HubFailed, Stopped."""
        self._failures += 1
        self._came_bytes = 0
        if failure.wait_s is not None and failure.wait_s > MOST_ASKED_WAIT_S:
            raise HubFailed(
                f"{host()} asks to wait {failure.wait_s:.0f} s before {self._what} is asked for",
                hint="Run the same command again then, it continues where it stopped",
            ) from None
        if self._failures >= TRIES:
            raise HubFailed(
                f"{self._what} did not come in {TRIES} tries; the last met {failure.reason}",
                hint="Run the same command again, it continues where it stopped",
            ) from None
        doubled_s = min(FIRST_WAIT_S * 2 ** (self._failures - 1), MOST_WAIT_S)
        # Not all connections, and not all machines, come back in the same moment.
        wait_s = doubled_s * random.uniform(0.75, 1.25)
        if failure.wait_s is not None:
            wait_s = failure.wait_s + random.uniform(0, 0.25)
        if self._stopped.wait(wait_s):
            raise Stopped


def list_files(repository: Repository) -> dict[str, RemoteFile]:
    """`Repository.list_files` with patience. Raises DownloadFailed, BadOption."""
    patience = Patience(f"the list of files of {repository.name}")
    while True:
        try:
            return repository.list_files()
        except TryAgain as failure:
            patience.wait(failure)


def read_range(
    repository: Repository,
    file: RemoteFile,
    start: int,
    stop: int,
    *,
    on_bytes: OnBytes | None = None,
    stopped: threading.Event | None = None,
) -> bytearray:
    """Bytes [start, stop) of a file, by as many requests as it takes. Raises DownloadFailed."""
    got = bytearray()
    patience = Patience(f"{file.name} of {repository.name}", stopped)

    def sink(piece: bytes) -> None:
        if stopped is not None and stopped.is_set():
            raise Stopped
        got.extend(piece)
        patience.progressed(len(piece))
        if on_bytes:
            on_bytes(len(piece))

    while len(got) < stop - start:
        try:
            repository.read(file, start + len(got), stop, sink)
        except TryAgain as failure:
            patience.wait(failure)
    return got


def read_ranges(
    repository: Repository,
    ranges: list[tuple[RemoteFile, int, int]],
    on_bytes: OnBytes | None = None,
) -> Generator[bytearray]:
    """The bytes of each (file, start, stop) in the order given, several of them at a time.

    `on_bytes` is called from other threads. Raises DownloadFailed.
    """
    stopped = threading.Event()
    waiting: deque[Future[bytearray]] = deque()
    left = iter(ranges)
    bring = partial(read_range, repository, on_bytes=on_bytes, stopped=stopped)
    pool = ThreadPoolExecutor(CONNECTIONS, "pull")
    try:
        for file, start, stop in itertools.islice(left, CONNECTIONS):
            waiting.append(pool.submit(bring, file, start, stop))
        while waiting:
            yield waiting.popleft().result()
            for file, start, stop in itertools.islice(left, 1):
                waiting.append(pool.submit(bring, file, start, stop))
    finally:
        stopped.set()  # one that hears nothing notices after HF_HUB_DOWNLOAD_TIMEOUT
        pool.shutdown(cancel_futures=True)


def download(
    repository: Repository, file: RemoteFile, path: Path, on_bytes: OnBytes | None = None
) -> None:
    """Brings a whole file to `path`, by way of `unfinished(path)`, where it continues.

    on_bytes: called with the number of bytes that came, from other threads; with a negative number
    when what was there had to be thrown away. What `unfinished(path)` held is not counted.
    Raises DownloadFailed, BadOutput while another process brings it, OSError for the disk.
    """
    with _open_unfinished(path) as handle:
        for attempt in ("resumed or whole", "whole"):
            digest = _Digest(file)
            if os.fstat(handle).st_size > file.num_bytes:
                os.ftruncate(handle, 0)
            there = _add_up(handle, digest)
            _fill(repository, file, handle, there, digest, on_bytes)
            if digest.right:
                break
            os.ftruncate(handle, 0)
            if attempt == "whole":
                raise BadDownload(
                    f"{file.name} of {repository.name} came twice with the checksum {digest.found}"
                    f" instead of {digest.wanted}",
                    hint="The repository, or a proxy on the way, has it wrong",
                )
            if on_bytes:
                on_bytes(-file.num_bytes)
        os.fsync(handle)
        os.replace(unfinished(path), path)


def unfinished(path: Path) -> Path:
    """Under which name a file grows."""
    return path.with_name(f"{path.name}.wanfit.incomplete")


class _Digest:
    """The checksum that the hub lists: SHA-256 of a large file, git's SHA-1 of a small one."""

    def __init__(self, file: RemoteFile) -> None:
        self.wanted = file.etag
        self._hash: Any = hashlib.sha256()
        if file.sha256 is None:
            self._hash = hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)

    def update(self, piece: bytes | bytearray) -> None:
        self._hash.update(piece)

    @property
    def found(self) -> str:
        return str(self._hash.hexdigest())

    @property
    def right(self) -> bool:
        return self.found == self.wanted


@contextmanager
def _open_unfinished(path: Path) -> Iterator[int]:
    """A descriptor of `unfinished(path)`, which is ours alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = -1
    try:
        while True:
            handle = os.open(unfinished(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _lock(handle, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), unfinished(path).stat()):
                    break
            os.close(handle)  # it got its final name between our opening it and our lock
        try:
            yield handle
        finally:
            if os.fstat(handle).st_size == 0:
                unfinished(path).unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadOutput(
            f"{path} is being downloaded by another process", hint="Wait until it is done"
        ) from None
    except OSError:
        pass  # a file system without locks


def _add_up(handle: int, digest: _Digest) -> int:
    """Adds what is there to `digest`; how many bytes that are."""
    os.lseek(handle, 0, os.SEEK_SET)
    there = 0
    while piece := os.read(handle, 1 << 20):
        digest.update(piece)
        there += len(piece)
    return there


def _fill(
    repository: Repository,
    file: RemoteFile,
    handle: int,
    there: int,
    digest: _Digest,
    on_bytes: OnBytes | None,
) -> None:
    """Appends what is missing."""
    ranges = [
        (file, start, min(start + SEGMENT_BYTES, file.num_bytes))
        for start in range(there, file.num_bytes, SEGMENT_BYTES)
    ]
    with closing(read_ranges(repository, ranges, on_bytes)) as segments:
        for segment in segments:
            digest.update(segment)
            left = memoryview(segment)
            while left:
                left = left[os.write(handle, left) :]
