"""A repository's part of the hub's cache on this disk (HF_HOME, HF_HUB_CACHE).

    models--OWNER--NAME/blobs/ETAG              a file's content
    models--OWNER--NAME/snapshots/COMMIT/PATH   a link to it
    models--OWNER--NAME/refs/REVISION           a file that holds the commit

As huggingface_hub 2.4 documents and reads it, so what it brought serves us, and what we keep serves
everybody. What an earlier program brought is taken by its name and length, and stays. What we bring
is written down beside the store first, so that it goes even if a later run ends the work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from wanfit.errors import HubFailed
from wanfit.pull.hub import RemoteFile, Repository
from wanfit.pull.transfer import OnBytes, download, unfinished

_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubCache:
    """The files of one repository here, and which of them this pull, or one before it, brought."""

    def __init__(self, repository: Repository, record: Path) -> None:
        """`record`: a file beside the store, for the names of what we brought."""
        self._repository = repository
        self.root = Path(constants.HF_HUB_CACHE)
        self.folder = self.root / repo_folder_name(repo_id=repository.name, repo_type="model")
        self._record = record
        self.downloaded_bytes = 0  # by this process
        self._counting = threading.Lock()
        self._ours = self._read_record()

    @property
    def snapshot(self) -> Path:
        """Where the files of the commit have their names."""
        return self.folder / "snapshots" / self._repository.commit

    def list_files(self) -> dict[str, RemoteFile]:
        """What is here of the revision, without asking anybody; pins the commit.

        Raises HubFailed when there is nothing.
        """
        revision = self._repository.revision
        commit = revision if (self.folder / "snapshots" / revision).is_dir() else ""
        with suppress(OSError):
            commit = commit or (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        self._repository.commit = commit
        files = {}
        for path in self.snapshot.rglob("*") if commit else ():
            if path.is_file():
                name = path.relative_to(self.snapshot).as_posix()
                blob = path.resolve().name
                sha256 = blob if _SHA256.fullmatch(blob) else None
                files[name] = RemoteFile(name, path.stat().st_size, sha256, blob)
        if not files:
            raise HubFailed(
                f"HF_HUB_OFFLINE is set, and {self.root} has no {revision} of"
                f" {self._repository.name}",
                hint="Unset HF_HUB_OFFLINE, or fetch the model where there is a network",
            )
        return files

    def open_record(self) -> None:
        """Makes sure that it can be written, before anything is brought. Raises OSError."""
        self._write_record()

    @property
    def brought(self) -> list[str]:
        """Names of the files that we brought, or began to."""
        return [key.partition("/")[2] for key in self._ours]

    def find(self, file: RemoteFile) -> Path | None:
        """A whole file, when it is here."""
        pointer, blob = self.snapshot / file.name, self._blob(file)
        if _has_length(pointer, file):
            return pointer
        if _has_length(blob, file):
            return self._link(file)
        return None

    def missing_bytes(self, file: RemoteFile) -> int:
        """How much of it is still to come."""
        if self.find(file):
            return 0
        with suppress(OSError):
            return max(file.num_bytes - unfinished(self._blob(file)).stat().st_size, 0)
        return file.num_bytes

    def bring(self, file: RemoteFile, on_bytes: OnBytes | None = None) -> Path:
        """The whole file, downloaded if need be. Raises DownloadFailed, BadOutput, OSError."""
        found = self.find(file)
        if found:
            return found
        self._note(file)

        def count(num_bytes: int) -> None:
            with self._counting:
                self.downloaded_bytes += max(num_bytes, 0)
            if on_bytes:
                on_bytes(num_bytes)

        download(self._repository, file, self._blob(file), count)
        self._write_ref()
        return self._link(file)

    def remove(self, file: RemoteFile) -> None:
        """Takes away a file that we brought; one that was here before stays."""
        key = self._key(file)
        if key in self._ours:
            self._remove(key, self._ours.pop(key))

    def remove_all(self) -> None:
        """Takes away everything that we brought, of other revisions too, and forgets it."""
        while self._ours:
            self._remove(*self._ours.popitem())
        self.keep_all()
        _remove_if_empty(self.folder)

    def keep_all(self) -> None:
        """Forgets what we brought, so that it stays."""
        self._ours.clear()
        self._record.unlink(missing_ok=True)

    def _blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.etag

    def _link(self, file: RemoteFile) -> Path:
        """Gives a blob its name in the snapshot; two files may share one."""
        if file.etag in self._ours.values():
            self._note(file)
        blob, pointer = self._blob(file), self.snapshot / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            os.symlink(os.path.relpath(blob, pointer.parent), pointer)
        except OSError:  # a file system without links: as huggingface_hub does there
            os.replace(blob, pointer)
        return pointer

    def _note(self, file: RemoteFile) -> None:
        """Writes down that we brought it, or are about to."""
        if self._key(file) not in self._ours:
            self._ours[self._key(file)] = file.etag
            self._write_record()

    def _write_ref(self) -> None:
        """Without it the revision's name would mean nothing offline."""
        revision, commit = self._repository.revision, self._repository.commit
        if revision != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            _replace_text(ref, commit)

    def _key(self, file: RemoteFile) -> str:
        return f"{self._repository.commit}/{file.name}"

    def _remove(self, key: str, etag: str) -> None:
        pointer, blob = self.folder / "snapshots" / key, self.folder / "blobs" / etag
        pointer.unlink(missing_ok=True)
        unfinished(blob).unlink(missing_ok=True)
        links = (self.folder / "snapshots").rglob("*")
        if not any(link.is_symlink() and link.resolve() == blob.resolve() for link in links):
            blob.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for folder in pointer.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def _read_record(self) -> dict[str, str]:
        """ "COMMIT/PATH" -> etag, of this repository."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            brought = record["brought"] if record["repository"] == self.folder.name else {}
        except (OSError, KeyError, TypeError, ValueError):
            return {}
        whole: Mapping[str, str] = brought if isinstance(brought, dict) else {}
        return {
            key: etag
            for key, etag in whole.items()
            if isinstance(etag, str) and re.fullmatch(r"[0-9a-f]{40,64}", etag)
            and ".." not in key.split("/") and not key.startswith("/")
        }  # fmt: skip

    def _write_record(self) -> None:
        record = {"repository": self.folder.name, "brought": self._ours}
        self._record.parent.mkdir(parents=True, exist_ok=True)
        _replace_text(self._record, json.dumps(record, indent=2) + "\n")


def _has_length(path: Path, file: RemoteFile) -> bool:
    try:
        return path.is_file() and path.stat().st_size == file.num_bytes
    except OSError:
        return False


def _replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _remove_if_empty(folder: Path) -> None:
    """A repository's folder in which no content is left."""
    blobs, snapshots = folder / "blobs", folder / "snapshots"
    left = [path for part in (blobs, snapshots) for path in part.rglob("*") if not path.is_dir()]
    if folder.is_dir() and not left:
        shutil.rmtree(folder, ignore_errors=True)
