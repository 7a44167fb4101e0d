"""What every store of finished clips does, and the values that pass in and out of it.

A key names what one attempt at a job has kept: JOB.LEASE, the id of the job and the token of the
lease under which it was made. So an attempt that wakes up late never writes over the result of the
one that took its place; what it kept is an orphan, which reconciliation finds by `keys`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from wanfit.errors import BadOption

Variant = Literal["video", "thumbnail", "spritesheet", "metadata"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FILE_NAMES: Mapping[Variant, str] = {
    "video": "clip.mp4",
    "thumbnail": "thumbnail.webp",
    "spritesheet": "spritesheet.jpg",
    "metadata": "metadata.json",
}
CONTENT_TYPES: Mapping[Variant, str] = {
    "video": "video/mp4",
    "thumbnail": "image/webp",
    "spritesheet": "image/jpeg",
    "metadata": "application/json",
}
# Letters, digits, _ and -: no separator of paths or of keys, nothing hidden, nothing relative.
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_KEY = re.compile(rf"({_ID.pattern})\.({_ID.pattern})")


def checked_id(given: str) -> str:
    """The id of a job or of a lease, when it can be a part of a file's name. Raises BadOption."""
    if not _ID.fullmatch(given):
        raise BadOption(
            f"{given[:100]!r} is not an id",
            hint="An id has 1 to 100 letters, digits, _ and -",
        )
    return given


def key_of(job_id: str, lease: str) -> str:
    """What an attempt keeps is kept by this name. Raises BadOption."""
    return f"{checked_id(job_id)}.{checked_id(lease)}"


def job_of(key: str) -> str | None:
    """The job of a key, None for what is no key: a stranger's, or a file that is not ours."""
    found = _KEY.fullmatch(key)
    return found[1] if found else None


@dataclass(frozen=True, slots=True)
class KeptFile:
    """One file of a kept clip."""

    num_bytes: int
    sha256: str
    content_type: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A clip that is kept: on disk or in S3, whole, and still there after a power cut."""

    key: str
    job_id: str
    attempt: int
    kept_s: float  # Unix time
    width: int
    height: int
    num_frames: int
    fps: float
    files: Mapping[Variant, KeptFile]  # without the metadata, which holds all of this

    @property
    def num_bytes(self) -> int:
        """Of the video."""
        return self.files["video"].num_bytes

    @property
    def sha256(self) -> str:
        """Of the video."""
        return self.files["video"].sha256

    @property
    def content_type(self) -> str:
        """Of the video."""
        return self.files["video"].content_type

    def to_json(self) -> dict[str, Any]:
        """Plain values: for the job's row, and for the metadata beside the clip."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        fields["files"] = {
            variant: {name: getattr(file, name) for name in file.__slots__}
            for variant, file in self.files.items()
        }
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Kept:
        """What `to_json` made."""
        files = {variant: KeptFile(**file) for variant, file in fields["files"].items()}
        return cls(**{**fields, "files": files})


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes [start, stop) of a kept file, piece by piece; use it up, or `close` it."""

    start: int
    stop: int
    whole_bytes: int  # of the whole file
    content_type: str
    pieces: Iterator[bytes]
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """What reconciliation needs of a kept clip."""

    key: str
    job_id: str
    num_bytes: int  # all files together
    kept_s: float  # Unix time


@dataclass(frozen=True, slots=True)
class Retention:
    """How long clips stay; None: for ever, or however many."""

    max_age_s: float | None = None
    max_bytes: int | None = None  # all clips together
    min_free_bytes: int = 1 << 30  # ours: of the disk, so that database and logs go on
    # Ours: a client that waits for its clip has ten minutes to fetch it, however full it gets.
    min_age_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep deleted."""

    deleted: tuple[Stored, ...]
    free_bytes: int | None  # of the disk afterwards; None: the store has no end


class OutputStore(Protocol):
    """Where finished clips are kept. All methods may be called from any thread."""

    def draft(self, job_id: str, lease: str) -> Path:
        """The path of a file to write the clip to, on the disk where `keep` wants it.

        Its directory is there. Raises DiskFull.
        """
        ...

    def keep(
        self, file: Path, *, job_id: str, attempt: int, lease: str, metadata: Mapping[str, Any]
    ) -> Kept:
        """Keeps an mp4 with its thumbnail, sheet and metadata: all of it, or nothing.

        `file` is what `draft` named, which is moved, or any other, which is copied. `metadata` is
        plain values. Asked twice by one lease it answers as before. Raises DiskFull; whatever is
        raised, the draft is as it was, to be kept later or deleted by its key.
        """
        ...

    def open(
        self, key: str, start: int = 0, stop: int | None = None, variant: Variant = "video"
    ) -> Body:
        """Bytes [start, stop) of a file, to the end where `stop` is None or beyond it.

        Raises NotKept, StoreFailed.
        """
        ...

    def path(self, key: str, variant: Variant = "video") -> Path | None:
        """Where the file lies on this machine, for a server that can send files; None: not here."""
        ...

    def url(
        self, key: str, expires_s: int, variant: Variant = "video", name: str | None = None
    ) -> str | None:
        """A signed address that gives the file to anybody until it expires; None: there is none.

        name: what a browser shall call the file.
        """
        ...

    def delete(self, key: str) -> None:
        """Deletes a clip with all beside it, or its draft; what is not there is no error.

        Raises StoreFailed.
        """
        ...

    def keys(self) -> Iterator[Stored]:
        """Every clip that is kept, in no order."""
        ...

    def check_room(self, num_bytes: int = 0) -> None:
        """Raises DiskFull when a clip of that size would touch the margin of free disk."""
        ...

    def sweep(self, now_s: float, keep: Container[str]) -> Swept:
        """Deletes what is too old or too much, oldest first, and drafts that nobody writes to.

        keep: ids of jobs that are running, and of others whose clips shall stay.
        """
        ...

    def clear_drafts(self, keep: Container[str]) -> None:
        """Deletes what dead attempts left half written, whatever its age.

        For the start, when no attempt but those of the jobs in `keep` can be running.
        """
        ...
