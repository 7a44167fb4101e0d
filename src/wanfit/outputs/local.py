"""Finished clips in a directory of this machine.

    DIRECTORY/JOB.LEASE/clip.mp4, thumbnail.webp, spritesheet.jpg, metadata.json
    DIRECTORY/.work/JOB.LEASE/    what an attempt writes to
    DIRECTORY/.trash/             what is being deleted

One clip is one directory, so that one rename makes all of it appear and another makes it vanish.
Before the rename every file and the directory are synced, after it the parent: a power cut leaves a
whole clip or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from wanfit.errors import BadSetting, DiskFull, NotKept
from wanfit.media.places import sync
from wanfit.outputs.pictures import draw_pictures
from wanfit.outputs.retention import too_much, too_old
from wanfit.outputs.store import (
    CONTENT_TYPES,
    FILE_NAMES,
    VARIANTS,
    Body,
    Kept,
    KeptFile,
    Retention,
    Stored,
    Swept,
    Variant,
    job_of,
    key_of,
)

PIECE_BYTES = 1 << 20  # ours: of what is read at once
FULL = (errno.ENOSPC, errno.EDQUOT)
# Ours: an attempt that lives writes at least a file's time within this; one that died does not.
IDLE_DRAFT_S = 3600.0


class LocalOutputs:
    """An OutputStore in a directory. Raises BadSetting where that cannot be written."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        self._directory = directory.absolute()
        self._retention = retention or Retention()
        self._work = self._directory / ".work"
        self._trash = self._directory / ".trash"
        try:
            for folder in (self._work, self._trash):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f"probe-{secrets.token_hex(4)}"
                probe.mkdir()
                probe.rmdir()
        except OSError as error:
            raise BadSetting(
                f"Finished clips cannot be kept in {str(directory)!r}: {error.strerror}",
                hint="Name a directory that this user may write to",
            ) from error

    def draft(self, job_id: str, lease: str) -> Path:
        """See OutputStore."""
        folder = self._work / key_of(job_id, lease)
        with self._disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
        return folder / FILE_NAMES["video"]

    def keep(
        self, file: Path, *, job_id: str, attempt: int, lease: str, metadata: Mapping[str, Any]
    ) -> Kept:
        """See OutputStore."""
        key = key_of(job_id, lease)
        if self.has(key):
            return self.kept(key)
        draft = self.draft(job_id, lease)
        try:
            with self._disk_errors():
                if file != draft:
                    shutil.copyfile(file, draft)
                kept = _complete(draft.parent, key, job_id, attempt, metadata)
                for path in (*draft.parent.iterdir(), draft.parent):
                    sync(path)
                self._appear(draft.parent, self._directory / key)
        except BaseException:
            self._undo(draft, is_ours=file != draft)
            raise
        return kept

    def has(self, key: str) -> bool:
        """Whether a clip is kept by that key."""
        return self.path(key) is not None

    def kept(self, key: str) -> Kept:
        """What is kept by that key. Raises NotKept."""
        path = self.path(key, "metadata")
        try:
            fields = json.loads(path.read_bytes()) if path else None
        except FileNotFoundError:  # deleted in between
            fields = None
        if fields is None:
            raise _not_kept(key)
        return Kept.from_json({name: fields[name] for name in Kept.__slots__})

    def open(
        self, key: str, start: int = 0, stop: int | None = None, variant: Variant = "video"
    ) -> Body:
        """See OutputStore. A clip that is deleted meanwhile is read to its end."""
        path = self.path(key, variant)
        try:
            stream = path.open("rb") if path else None
        except FileNotFoundError:
            stream = None
        if stream is None:
            raise _not_kept(key)
        whole_bytes = os.fstat(stream.fileno()).st_size
        stop = whole_bytes if stop is None else min(stop, whole_bytes)
        start = min(max(start, 0), stop)
        pieces = _pieces(stream, start, stop)
        return Body(start, stop, whole_bytes, CONTENT_TYPES[variant], pieces, stream.close)

    def path(self, key: str, variant: Variant = "video") -> Path | None:
        """See OutputStore."""
        if job_of(key) is None:
            return None
        path = self._directory / key / FILE_NAMES[variant]
        return path if path.is_file() else None

    def url(
        self, key: str, expires_s: int, variant: Variant = "video", name: str | None = None
    ) -> str | None:
        """None: files of this machine have an address of the server only."""
        return None

    def delete(self, key: str) -> None:
        """See OutputStore."""
        if job_of(key) is not None:
            self._discard(self._directory / key)
            self._discard(self._work / key)

    def keys(self) -> Iterator[Stored]:
        """See OutputStore."""
        for folder in self._directory.iterdir():
            job_id = job_of(folder.name)
            if job_id is None:
                continue
            try:
                kept_s = (folder / FILE_NAMES["video"]).stat().st_mtime
                num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):  # deleted meanwhile, or not ours
                continue
            yield Stored(folder.name, job_id, num_bytes, kept_s)

    def check_room(self, num_bytes: int = 0) -> None:
        """See OutputStore."""
        free_bytes = self.free_bytes()
        margin_bytes = self._retention.min_free_bytes
        if free_bytes - num_bytes < margin_bytes:
            raise DiskFull(
                f"{self._directory} has {free_bytes / 1e9:.2f} GB free, and"
                f" {num_bytes / 1e9:.2f} GB and a margin of {margin_bytes / 1e9:.2f} GB are needed",
                hint="Make room, or let clips be deleted sooner",
            )

    def free_bytes(self) -> int:
        """What this user may still write here."""
        return shutil.disk_usage(self._directory).free

    def sweep(self, now_s: float, keep: Container[str]) -> Swept:
        """See OutputStore."""
        rules = self._retention
        deleted: list[Stored] = []

        def drop(clip: Stored) -> None:
            self.delete(clip.key)
            deleted.append(clip)

        self._clear(self._trash)
        self._drop_drafts(keep, before_s=now_s - IDLE_DRAFT_S)
        stored = list(self.keys())
        for clip in too_old(stored, now_s, rules, keep):
            drop(clip)
        if rules.max_bytes is not None:
            left = [clip for clip in stored if clip not in deleted]
            over_bytes = sum(clip.num_bytes for clip in left) - rules.max_bytes
            for clip in too_much(left, now_s, rules, keep, over_bytes):
                drop(clip)
        left = [clip for clip in stored if clip not in deleted]
        lacking_bytes = rules.min_free_bytes - self.free_bytes()
        for clip in too_much(left, now_s, rules, keep, lacking_bytes):
            drop(clip)
        return Swept(tuple(deleted), self.free_bytes())

    def clear_drafts(self, keep: Container[str]) -> None:
        """See OutputStore."""
        self._clear(self._trash)
        self._drop_drafts(keep, before_s=None)

    def _drop_drafts(self, keep: Container[str], before_s: float | None) -> None:
        for folder in list(self._work.iterdir()):
            if job_of(folder.name) in keep:
                continue
            with suppress(FileNotFoundError):
                touched_s = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if before_s is None or touched_s < before_s:
                    self._discard(folder)

    @staticmethod
    def _undo(draft: Path, *, is_ours: bool) -> None:
        """Deletes what a failed `keep` has made; the caller's clip stays, to be kept later."""
        if is_ours:
            shutil.rmtree(draft.parent, ignore_errors=True)
        for path in draft.parent.glob("*"):
            if path != draft:
                path.unlink(missing_ok=True)

    def _appear(self, folder: Path, final: Path) -> None:
        """Gives a whole and synced directory its name. One that is there is of the same lease."""
        try:
            folder.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self._discard(final)
            folder.rename(final)
        sync(self._directory)

    def _discard(self, folder: Path) -> None:
        """Makes a directory vanish in one step, and then deletes what was in it."""
        aside = self._trash / f"{folder.name}-{secrets.token_hex(4)}"
        try:
            folder.rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)

    @staticmethod
    def _clear(folder: Path) -> None:
        for path in list(folder.iterdir()):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull(
                f"The disk of {self._directory} is full ({error.strerror}):"
                f" {self.free_bytes() / 1e6:.1f} MB free",
                hint="Make room, or let clips be deleted sooner",
            ) from error


def _complete(
    folder: Path, key: str, job_id: str, attempt: int, metadata: Mapping[str, Any]
) -> Kept:
    """Puts thumbnail, sheet and metadata beside the video."""
    paths = {variant: folder / name for variant, name in FILE_NAMES.items()}
    clip = draw_pictures(paths["video"], paths["thumbnail"], paths["spritesheet"])
    kept = Kept(
        key=key,
        job_id=job_id,
        attempt=attempt,
        kept_s=time.time(),
        width=clip.width,
        height=clip.height,
        num_frames=clip.num_frames,
        fps=clip.fps,
        files={
            variant: _facts(paths[variant], variant)
            for variant in VARIANTS
            if variant != "metadata"
        },
    )
    text = json.dumps({**kept.to_json(), "metadata": metadata}, ensure_ascii=False, indent=1)
    paths["metadata"].write_text(text + "\n", encoding="utf-8")
    return kept


def _facts(path: Path, variant: Variant) -> KeptFile:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return KeptFile(stream.tell(), digest.hexdigest(), CONTENT_TYPES[variant])


def _pieces(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    with stream:
        stream.seek(start)
        while start < stop:
            piece = stream.read(min(PIECE_BYTES, stop - start))
            if not piece:
                return  # shorter than it was; nothing of ours does that
            start += len(piece)
            yield piece


def _not_kept(key: str) -> NotKept:
    return NotKept(f"No clip is kept by {key[:210]!r}", hint="It was deleted, or its time was over")
