"""Where a clip goes: checked before any work, and filled in one step at the end."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanfit.errors import BadOutput

Format = Literal["mp4", "gif", "npy", "png"]

SUFFIXES: Mapping[str, Format] = {".mp4": "mp4", ".gif": "gif", ".npy": "npy"}
FRAME_NAME = re.compile(r"frame_\d{5}\.png")


@dataclass(frozen=True, slots=True)
class Output:
    """A place that was writable when it was checked, and the format that goes there."""

    path: Path
    format: Format


def check_output(output: str | Path) -> Output:
    """Chooses the format and makes sure that the place can be written, before any work is done.

    `.mp4`, `.gif` and `.npy` are files, and one that exists will be replaced. A path without a
    suffix, or that ends in "/", is a directory of PNG frames: a new one, an empty one, or one that
    holds nothing but such frames, which will be replaced. Missing parents are made later.
    Raises BadOutput.
    """
    text = os.fspath(output)
    path = Path(text)
    known = SUFFIXES.get(path.suffix.lower())
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python spells stray bytes
        raise BadOutput(f"{text!r} is not valid UTF-8", hint="Give another name")
    with write_errors(path):
        if known and not text.endswith("/"):
            _check_file(path)
            return Output(path, known)
        if path.suffix and not text.endswith("/") and not path.is_dir():
            raise BadOutput(
                f"No format is known by the suffix {path.suffix!r} of {text!r}",
                hint="Use .mp4, .gif or .npy, or a directory for PNG frames",
            )
        _check_frames_directory(path)
        return Output(path, "png")


def check_sheet(path: Path) -> Path:
    """The path, when a contact sheet can be written there as a PNG. Raises BadOutput."""
    if path.suffix.lower() != ".png":
        raise BadOutput(f"A contact sheet is a PNG, and {str(path)!r} does not end in .png")
    with write_errors(path):
        _check_file(path)
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise BadOutput(f"{str(path)!r} is a directory", hint="Give another file name")
    _check_parent(path)


def _check_frames_directory(path: Path) -> None:
    name = repr(str(path))
    if path.name in ("", ".."):
        raise BadOutput(f"{name} names no new directory", hint="Give a name, as in frames/")
    if os.path.lexists(path):
        if not path.is_dir() or path.is_symlink():
            raise BadOutput(f"{name} is not a directory", hint="Use .mp4, .gif or .npy for a file")
        if path.is_mount():
            raise BadOutput(
                f"{name} is a mount point, which cannot be replaced",
                hint=f"Give a directory in it, as in {path / 'frames'}",
            )
        if not all(FRAME_NAME.fullmatch(entry.name) for entry in path.iterdir()):
            raise BadOutput(
                f"The directory {name} holds other things than the frames of a clip",
                hint=f"Give a file in it, as in {path / 'clip.mp4'}, or an empty directory",
            )
    _check_parent(path)


def _check_parent(path: Path) -> None:
    """Writes and drops a nameless file in the nearest directory that exists: the only sure test."""
    with suppress(FileNotFoundError):
        path.lstat()  # raises for a name that is too long, or whose parent is a file
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    with tempfile.TemporaryFile(dir=nearest):
        pass


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into BadOutput."""
    try:
        yield
    except OSError as error:
        hint = "Make room, or write elsewhere" if error.errno == errno.ENOSPC else "Write elsewhere"
        raise BadOutput(f"Cannot write {str(path)!r}: {reason(error)}", hint=hint) from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise BadOutput(f"{str(path)!r} is not a path: {error}") from error


def reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


class Part:
    """A file or directory that is being written, under a hidden name beside its final one."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        # 40 characters are at most 160 bytes: the name stays within the 255 of a file system
        self.path = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")

    def commit(self) -> None:
        """Gives it its final name, once its bytes are on disk."""
        sync(self.path)
        if self.path.is_dir() and self._target.exists():
            self._replace_directory()
        else:
            os.replace(self.path, self._target)
        self._made.clear()
        with suppress(OSError):  # some network file systems have no sync of directories
            sync(self._target.parent)

    def discard(self) -> None:
        """Removes what is left. Nothing is, after a commit."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        for parent in self._made:
            with suppress(OSError):  # not empty any more: someone else uses it
                parent.rmdir()

    def _replace_directory(self) -> None:
        """A directory with files in it cannot be replaced in one step: the old one steps aside."""
        aside = self.path.with_suffix(".old")
        self._target.rename(aside)
        try:
            self.path.rename(self._target)
        except BaseException:
            aside.rename(self._target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
