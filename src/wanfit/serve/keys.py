"""API keys: made, kept as hashes, recognised in constant time.

A key is `wf_` and 256 random bits. The file has its SHA-256 alone: a fast hash is enough for what
nobody can guess, and it lets a request be checked in microseconds. The server reads the file again
when it changes, so a revoked key is refused from the next request on. Left out: what a caller may
do with a key (`limits`).
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from wanfit.errors import BadOption, BadSetting
from wanfit.settings import Limits

KEY_PREFIX = "wf_"  # so that scanners for leaked secrets can know one
KEY_BYTES = 32
MIN_GIVEN_CHARS = 22  # of a key from the environment: 128 bits in base64
ENVIRONMENT_ID = "environment"
MAX_NAME_CHARS = 100


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key; the key itself is shown once, when it is made."""

    id: str
    name: str
    sha256: str
    created_s: float
    revoked_s: float | None
    limits: Limits


class KeyFile:
    """The file of keys. Changes are made under a lock and appear whole. Raises BadSetting."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Key, ...]:
        """All keys, revoked ones too; none where there is no file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from error
        try:
            return tuple(_key_of(entry) for entry in json.loads(text)["keys"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(f"it is not what wanfit keys writes ({error})") from error

    def add(self, name: str, limits: Limits) -> tuple[str, Key]:
        """A new key: what its owner sends, and what is kept. Raises BadOption for a bad name."""
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise BadOption(f"The name of a key has 1 to {MAX_NAME_CHARS} characters that print")
        text = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        with self._changing() as keys:
            if any(key.name == name and key.revoked_s is None for key in keys):
                raise BadOption(f"There is a key {name!r} already", hint="Name it otherwise")
            key = Key(
                "key_" + secrets.token_hex(6), name, sha256_of(text), time.time(), None, limits
            )
            keys.append(key)
        return text, key

    def revoke(self, which: str) -> Key:
        """The key of that id or name, refused from now on. Raises BadOption where there is none."""
        with self._changing() as keys:
            for place, key in enumerate(keys):
                if which in (key.id, key.name) and key.revoked_s is None:
                    keys[place] = replace(key, revoked_s=time.time())
                    return keys[place]
        raise BadOption(f"There is no live key {which!r}", hint="wanfit keys list shows them")

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """The keys, to be changed; they are written when the block ends without an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                keys = list(self.read())
                yield keys
                self._write(keys)
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from error

    def _write(self, keys: list[Key]) -> None:
        fresh = self.path.with_suffix(".new")
        text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)

    def _broken(self, why: str) -> BadSetting:
        return BadSetting(f"The keys in {str(self.path)!r} cannot be used: {why}")


def _key_of(entry: dict[str, Any]) -> Key:
    limits = {name: entry["limits"][name] for name in (part.name for part in fields(Limits))}
    return Key(
        id=str(entry["id"]),
        name=str(entry["name"]),
        sha256=str(entry["sha256"]),
        created_s=float(entry["created_s"]),
        revoked_s=entry["revoked_s"],
        limits=Limits(**limits),
    )


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class Keyring:
    """The keys that a running server knows: those of the file, and one of the environment."""

    def __init__(self, file: KeyFile, given: str | None, limits: Limits) -> None:
        """Raises BadSetting for a file that cannot be read, or a given key that is too short."""
        if given is not None and len(given) < MIN_GIVEN_CHARS:
            raise BadSetting(
                f"WANFIT_API_KEY has {len(given)} characters, under {MIN_GIVEN_CHARS}",
                hint="wanfit keys add makes one that nobody guesses",
            )
        self._file = file
        self._given = (
            () if given is None
            else (Key(ENVIRONMENT_ID, ENVIRONMENT_ID, sha256_of(given), 0.0, None, limits),)
        )  # fmt: skip
        self._seen: object = None
        self._live: tuple[Key, ...] = ()
        self._asks = False
        self._refresh()

    @property
    def asks(self) -> bool:
        """Whether a key is asked for: from the first one that there is, and then for good.

        Revoking the last key closes the server to all; it does not open it.
        """
        self._refresh()
        return self._asks

    def find(self, text: str) -> Key | None:
        """The live key of that text.

        In constant time: whatever is sent, its hash (of one length) is compared with that of every
        live key, each by a comparison that does not stop at the first difference.
        """
        self._refresh()
        sent = sha256_of(text)
        found = None
        for key in self._live:
            if hmac.compare_digest(sent, key.sha256):
                found = key
        return found

    def _refresh(self) -> None:
        """Reads the file anew when it is another one. While it is broken nobody gets in."""
        stamp = _stamp(self._file.path)
        if stamp != self._seen:
            keys = self._file.read()
            self._live = (*self._given, *(key for key in keys if key.revoked_s is None))
            self._asks = self._asks or bool(self._given) or bool(keys)
            self._seen = stamp


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "none"
    return status.st_ino, status.st_mtime_ns, status.st_size
