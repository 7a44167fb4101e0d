"""Finished clips in S3, by way of a directory of this machine.

A clip is kept here first, as `local` does it, and is safe from then on. A thread uploads what waits
in that directory and deletes it here when all of it is there; while S3 is away it tries again, and
so does the next process after a kill. So a job is never lost, and never waits, for S3: until the
upload is done the clip is read from here. In the bucket the video comes last, so a clip whose video
is there is whole.

    s3://BUCKET/PREFIX/JOB.LEASE/clip.mp4, thumbnail.webp, spritesheet.jpg, metadata.json
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanfit.errors import NotKept, StoreFailed, StoreGone
from wanfit.outputs.bucket import Bucket, Object
from wanfit.outputs.local import LocalOutputs
from wanfit.outputs.retention import too_much, too_old
from wanfit.outputs.store import (
    CONTENT_TYPES,
    FILE_NAMES,
    Body,
    Kept,
    Retention,
    Stored,
    Swept,
    Variant,
    job_of,
    key_of,
)

# In this order: the video says that all is there.
UPLOADED: tuple[Variant, ...] = ("metadata", "thumbnail", "spritesheet", "video")
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0  # ours: between tries, doubled each time
# Ours: so long `keep` waits for the upload, so that who asks at once gets the address in S3.
PATIENCE_S = 10.0
DEAD_UPLOAD_S = 86400.0  # ours: an upload in parts that is a day old belongs to nobody

_log = logging.getLogger(__name__)


class S3Outputs:
    """An OutputStore in a bucket. `spool` is a directory of this process alone.

    Raises BadSetting, and StoreFailed when `check` finds that the bucket cannot be written to.
    """

    def __init__(
        self,
        bucket: Bucket,
        spool: Path,
        retention: Retention | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._bucket = bucket
        self._rules = retention or Retention()
        # Of the spool nothing is ever swept but drafts: it holds what S3 has not got.
        margin_bytes = self._rules.min_free_bytes
        self._spool = LocalOutputs(
            spool, Retention(min_free_bytes=margin_bytes, min_age_s=float("inf"))
        )
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting = {stored.key for stored in self._spool.keys()}  # noqa: SIM118  not a dict
        self._trouble: StoreFailed | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._upload_all, name="upload", daemon=True)
        self._thread.start()

    def close(self, wait_s: float = 5.0) -> None:
        """Ends the uploading; what waits is uploaded by the next process."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(wait_s)

    def check(self) -> None:
        """Asks the bucket for what will be needed. Raises StoreGone, StoreRefused."""
        self._bucket.check()

    def pending(self) -> tuple[frozenset[str], StoreFailed | None]:
        """Clips that are here and not yet in S3, and what the last try met."""
        with self._changed:
            return frozenset(self._waiting), self._trouble

    def settle(self, patience_s: float) -> None:
        """Waits until everything is in S3. Raises what stands in the way, after so long."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting, patience_s)
            if not done:
                raise self._trouble or StoreGone(
                    f"{len(self._waiting)} clips are not in {self._bucket.place} after"
                    f" {patience_s:.0f} s",
                    hint="They are on this machine until they are",
                )

    def draft(self, job_id: str, lease: str) -> Path:
        """See OutputStore."""
        return self._spool.draft(job_id, lease)

    def keep(
        self, file: Path, *, job_id: str, attempt: int, lease: str, metadata: Mapping[str, Any]
    ) -> Kept:
        """See OutputStore. When S3 does not answer soon, the clip waits here, and is kept."""
        key = key_of(job_id, lease)
        if not file.exists() and not self._spool.has(key):
            return self._uploaded(key)
        kept = self._spool.keep(
            file, job_id=job_id, attempt=attempt, lease=lease, metadata=metadata
        )
        with self._changed:
            self._waiting.add(key)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: key not in self._waiting or self._trouble is not None, self._patience_s
            )
        return kept

    def open(
        self, key: str, start: int = 0, stop: int | None = None, variant: Variant = "video"
    ) -> Body:
        """See OutputStore."""
        with suppress(NotKept):
            return self._spool.open(key, start, stop, variant)
        name = _name(key, variant)
        whole_bytes = self._bucket.size(name)
        stop = whole_bytes if stop is None else min(stop, whole_bytes)
        start = min(max(start, 0), stop)
        content_type = CONTENT_TYPES[variant]
        if start == stop:
            return Body(start, stop, whole_bytes, content_type, iter(()), lambda: None)
        pieces, answer = self._bucket.read(name, start, stop)
        return Body(start, stop, whole_bytes, content_type, pieces, answer.close)

    def path(self, key: str, variant: Variant = "video") -> Path | None:
        """None: a file that is here now may be in S3 only when it is opened."""
        return None

    def url(
        self, key: str, expires_s: int, variant: Variant = "video", name: str | None = None
    ) -> str | None:
        """See OutputStore. None for a clip that is not in S3 yet."""
        if job_of(key) is None or self._spool.has(key):
            return None
        content_type = CONTENT_TYPES[variant]
        return self._bucket.signed_url(_name(key, variant), expires_s, content_type, name)

    def delete(self, key: str) -> None:
        """See OutputStore. The upload that may be on its way notices, and cleans up."""
        if job_of(key) is None:
            return
        self._spool.delete(key)
        with self._changed:
            self._waiting.discard(key)
            self._changed.notify_all()
        self._bucket.delete([_name(key, variant) for variant in FILE_NAMES])

    def keys(self) -> Iterator[Stored]:
        """See OutputStore. Raises StoreFailed."""
        here = {stored.key: stored for stored in self._spool.keys()}  # noqa: SIM118
        yield from here.values()
        for key, objects in self._listed().items():
            stored = _stored(key, objects)
            if stored is not None and key not in here:
                yield stored

    def check_room(self, num_bytes: int = 0) -> None:
        """See OutputStore: of the disk that a clip passes on its way."""
        self._spool.check_room(num_bytes)

    def sweep(self, now_s: float, keep: Container[str]) -> Swept:
        """See OutputStore. Raises StoreFailed when S3 is away, having deleted nothing."""
        rules = self._rules
        listed = self._listed()
        stored = [found for key, objects in listed.items() if (found := _stored(key, objects))]
        going = list(too_old(stored, now_s, rules, keep))
        if rules.max_bytes is not None:
            left = [clip for clip in stored if clip not in going]
            over_bytes = sum(clip.num_bytes for clip in left) - rules.max_bytes
            going += too_much(left, now_s, rules, keep, over_bytes)
        for clip in going:
            self.delete(clip.key)
        self._drop_halves(listed, now_s)
        self._spool.sweep(now_s, keep)
        return Swept(tuple(going), None)

    def clear_drafts(self, keep: Container[str]) -> None:
        """See OutputStore."""
        self._spool.clear_drafts(keep)

    def _uploaded(self, key: str) -> Kept:
        """What a former call of the same lease has kept. Raises StoreFailed."""
        body = self.open(key, variant="metadata")
        fields = json.loads(b"".join(body.pieces))
        return Kept.from_json({name: fields[name] for name in Kept.__slots__})

    def _drop_halves(self, listed: Mapping[str, list[Object]], now_s: float) -> None:
        """What a process that died while uploading has left; its clip is in its spool."""
        before_s = now_s - DEAD_UPLOAD_S
        halves = [
            found.name
            for key, objects in listed.items()
            if _stored(key, objects) is None
            for found in objects
            if found.modified_s < before_s
        ]
        self._bucket.delete(halves)
        self._bucket.abort_uploads(before_s)

    def _listed(self) -> dict[str, list[Object]]:
        """Objects of each key; what is not ours is left out."""
        found: dict[str, list[Object]] = {}
        for entry in self._bucket.objects():
            key, slash, name = entry.name.partition("/")
            if slash and job_of(key) is not None and name in FILE_NAMES.values():
                found.setdefault(key, []).append(entry)
        return found

    def _upload_all(self) -> None:
        """The thread: uploads what waits, until the store is closed."""
        wait_s = FIRST_WAIT_S
        while not self._closed.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                keys = sorted(self._waiting)
            trouble = self._upload_these(keys)
            if trouble is None:
                wait_s = FIRST_WAIT_S
                continue
            _log.warning("%d clips wait for S3: %s", len(keys), trouble)
            with self._changed:
                self._trouble = trouble
                self._changed.notify_all()
            self._closed.wait(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(2 * wait_s, MOST_WAIT_S)

    def _upload_these(self, keys: Iterable[str]) -> StoreFailed | None:
        """Tries each; one that fails holds up no other, but where S3 is away."""
        trouble: StoreFailed | None = None
        for key in keys:
            if self._closed.is_set():
                return trouble
            try:
                self._upload(key)
            except StoreGone as error:
                return error
            except StoreFailed as error:
                trouble = error
            except Exception as error:  # noqa: BLE001  this thread is the only one that uploads
                _log.exception("clip %s was not uploaded", key)
                trouble = StoreGone(f"{key} was not uploaded ({type(error).__name__})")
        return trouble

    def _upload(self, key: str) -> None:
        """One clip, from here to S3. Deleted meanwhile, it is deleted there too."""
        try:
            kept = self._spool.kept(key)
            for variant in UPLOADED:
                path = self._spool.path(key, variant)
                if path is None:
                    raise FileNotFoundError(key)
                tags = {"sha256": kept.files[variant].sha256} if variant in kept.files else {}
                self._bucket.upload(path, _name(key, variant), CONTENT_TYPES[variant], tags)
            num_bytes = self._bucket.size(_name(key, "video"))
            if num_bytes != kept.num_bytes:
                raise StoreGone(f"{num_bytes} of {kept.num_bytes} bytes of {key} arrived")
            gone = not self._spool.has(key)
        except (FileNotFoundError, NotKept):
            gone = True
        if gone:
            self._bucket.delete([_name(key, variant) for variant in FILE_NAMES])
        self._spool.delete(key)
        with self._changed:
            self._waiting.discard(key)
            self._trouble = None
            self._changed.notify_all()


def _name(key: str, variant: Variant) -> str:
    if job_of(key) is None:
        raise NotKept(f"No clip is kept by {key[:210]!r}")
    return f"{key}/{FILE_NAMES[variant]}"


def _stored(key: str, objects: list[Object]) -> Stored | None:
    """A whole clip, or None for what is without its video."""
    job_id = job_of(key)
    videos = [found for found in objects if found.name.endswith(f"/{FILE_NAMES['video']}")]
    if job_id is None or not videos:
        return None
    num_bytes = sum(found.num_bytes for found in objects)
    return Stored(key, job_id, num_bytes, videos[0].modified_s)
