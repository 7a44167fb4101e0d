"""A store that is being written: kept across a kill, shown to nobody before it is whole.

    .NAME.partial/journal     whose it is, then one line for each unit that is on the disk
    .NAME.partial/store/      becomes NAME in one rename
    .NAME.partial/old/        what was at NAME, until that rename is done

A unit's line is written after its bytes were synced, so what the journal lists survives even a
power cut. Files hold units in order, so the list is all that there is to know. `weights.lean` fills
files out of order, and lists files of its source instead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self

from wanfit.engine.weights.recognise import is_store
from wanfit.errors import BadOutput, DiskFull


class DoneUnit(NamedTuple):
    """A line of the journal."""

    file: str
    unit: str  # or, of a store made file by file (`weights.lean`), the file of the source
    end_bytes: int  # of the unit, in the file
    checksum: str


class PartialStore:
    """Opened for one job, under a lock; left as it is at any time, to be continued later."""

    def __init__(self, target: Path, job: str) -> None:
        """`job` says what is made from what: a partial store of another job is thrown away.

        Raises BadOutput when another process is writing it; OSError.
        """
        self._target = target
        self._folder = partial_folder(target)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.store = self._folder / "store"
        self._old = self._folder / "old"
        self._journal: IO[str] = (self._folder / "journal").open("a+", encoding="utf-8")
        try:
            self._lock()
            self._put_back()
            self.done = self._read(job)
            self._worth_keeping = bool(self.done)
            if not self.done:
                self._begin(job)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._worth_keeping:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._journal.close()

    def record(self, units: Iterable[DoneUnit]) -> None:
        """Notes units whose bytes are on the disk."""
        self._worth_keeping = True
        for unit in units:
            self._journal.write(json.dumps(unit) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def commit(self) -> None:
        """Gives the store its name. A store that was there is moved away first, removed last."""
        sync_path(self.store)
        try:
            if self._target.exists():
                os.rename(self._target, self._old)
            os.rename(self.store, self._target)
        except BaseException:
            self._put_back()
            raise
        self._worth_keeping = False
        with suppress(OSError):  # some network file systems have no sync of directories
            sync_path(self._target.parent)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadOutput(
                f"{self._target} is being written by another process", hint="Wait until it is done"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _put_back(self) -> None:
        """Undoes a commit that stopped between its two renames; tidies up after a later stop."""
        if self._old.exists() and not self._target.exists():
            os.rename(self._old, self._target)
        shutil.rmtree(self._old, ignore_errors=True)

    def _read(self, job: str) -> tuple[DoneUnit, ...]:
        """What is done of this job; nothing, if the journal is another's or files are gone."""
        self._journal.seek(0)
        lines = self._journal.readlines()
        if lines and not lines[-1].endswith("\n"):  # killed while it wrote
            self._journal.truncate(sum(len(line.encode()) for line in lines[:-1]))
            lines.pop()
        try:
            if not lines or json.loads(lines[0]) != {"job": job}:
                return ()
            done = tuple(DoneUnit(*json.loads(line)) for line in lines[1:])
            sizes = {unit.file: (self.store / unit.file).stat().st_size for unit in done}
        except (OSError, TypeError, ValueError):
            return ()
        return done if all(unit.end_bytes <= sizes[unit.file] for unit in done) else ()

    def _begin(self, job: str) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir()
        self._journal.truncate(0)
        self._journal.write(json.dumps({"job": job}) + "\n")
        self._journal.flush()


def partial_folder(target: Path) -> Path:
    """Where the store for `target` is while it is made."""
    return target.with_name(f".{target.name}.partial")


def allocated_bytes(folder: Path) -> int:
    """What the files below a directory hold of the disk, holes left out; 0 where none is."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def check_target(source: Path, target: Path, files: Iterable[Path] = ()) -> None:
    """Raises BadOutput unless `target` is free, or a store that may be replaced.

    files: of the source, which may lie elsewhere.
    """
    with write_errors(target):
        target = target.resolve()
        sources = [path.resolve() for path in (source, *files)]
        if any(target == path or target in path.parents for path in sources):
            raise BadOutput(f"{target} holds the source", hint="Choose another path")
        if target.is_mount():
            raise BadOutput(
                f"{target} is a mount point, which cannot be replaced",
                hint=f"Give a directory in it, as in {target / 'model'}",
            )
        free = not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))
        if not free and not is_store(target):
            raise BadOutput(f"{target} is there and is not a store", hint="Choose another path")


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turns what the file system refuses into DiskFull or BadOutput."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = shutil.disk_usage(target.parent).free
            raise DiskFull(
                f"{target.parent} is full ({error.strerror}): {free_bytes / 1e9:.2f} GB free",
                hint="Make room and run the same command again, it continues where it stopped",
            ) from error
        raise BadOutput(
            f"Cannot write {target}: {error.strerror}", hint="Write elsewhere"
        ) from error


def sync_path(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
