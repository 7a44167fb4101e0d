"""A server on loopback with the shape of the Hugging Face hub, which can be told to fail.

Two real HTTP servers: the hub (lists, small files) and the content network on another port, where
the hub redirects for large files. Shape and headers as the hub has them, watched with
huggingface_hub 2.4, whose own `hf_hub_download` is served too (a test holds that).

    GET       /api/models/OWNER/NAME[/revision/REV]?blobs=true     commit, and files with checksums
    GET       /api/models/OWNER/NAME/tree/REV?recursive=true       the files in another form
    HEAD GET  /OWNER/NAME/resolve/REV/PATH        small: 307 to the next line; large: 302 elsewhere
    HEAD GET  /api/resolve-cache/models/OWNER/NAME/COMMIT/PATH
    HEAD GET  /content/OWNER/NAME/PATH?Signature=... on the other port: with ranges
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "s1gned"  # stands in the query of every address of the content network
LARGE_SUFFIXES = (".safetensors", ".pth", "tokenizer.json")  # kept in LFS, whatever their length
PIECE_BYTES = 1 << 16
STALL_S = 60.0  # longer than any test waits

Where = Literal["list", "resolve", "content"]


@dataclass(slots=True)
class Fault:
    """What goes wrong with one kind of request for one file, `times` times from now on.

    status: the answer instead of the right one, with `headers` and, where the hub has one, its
    error code. cut_after_bytes: the connection is closed after so many bytes of the body.
    stall_after_bytes: nothing comes after so many. file: another file's bytes, by its own length.
    ignore_range: the whole file with 200. from_byte: of ranges that begin before, nothing.
    """

    where: Where
    status: int | None = None
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after_bytes: int | None = None
    stall_after_bytes: int | None = None
    file: Path | None = None
    ignore_range: bool = False
    from_byte: int = 0  # for requests that begin there or behind
    times: int | None = 1  # None: always


@dataclass(frozen=True, slots=True)
class Seen:
    """One request."""

    where: Where
    method: str
    path: str  # of the file; empty for a list
    range: str | None
    authorization: str | None
    range_bytes: int | None  # asked for


@dataclass(slots=True)
class Repo:
    """A directory, served as a repository.

    token: what may read it; None: everybody. gated: its files need a token that was let in.
    hashes: instead of those of the content, for files too large to add up.
    """

    folder: Path
    token: str | None = None
    gated: bool = False
    commit: str = "c" * 40
    revisions: tuple[str, ...] = ("main",)
    hashes: dict[str, str] = field(default_factory=dict)

    def listing(self) -> list[dict[str, Any]]:
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                siblings.append(self._sibling(name, path))
        return siblings

    def etag(self, name: str) -> str:
        path = self.folder / name
        if name in self.hashes:
            return self.hashes[name]
        return _sha256(path) if _is_large(name) else _git_sha1(path.read_bytes())

    def _sibling(self, name: str, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        if not _is_large(name):
            return {"rfilename": name, "size": size, "blobId": self.etag(name)}
        sha256 = self.etag(name)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return {
            "rfilename": name,
            "size": size,
            "blobId": _git_sha1(pointer.encode()),
            "lfs": {"sha256": sha256, "size": size, "pointerSize": len(pointer)},
        }


class HubServer:
    """`endpoint` is what HF_ENDPOINT has to be. Faults and requests are seen by all threads."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.stalled = threading.Event()  # a response went silent
        self.woken = threading.Event()  # silent responses end, cut off
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), handler) for handler in (_Hub, _Content)]
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.content_endpoint = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )

    def close(self) -> None:
        self.woken.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, path: str, fault: Fault) -> None:
        """From now on; faults of one file happen in the order in which they were added."""
        with self._lock:
            self._faults.append((path, fault))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def sent(self, path: str) -> list[Seen]:
        """The requests for a file's content."""
        return [seen for seen in self.seen if seen.where == "content" and seen.path == path]

    def next_fault(self, where: Where, path: str, start: int) -> Fault | None:
        with self._lock:
            for i, (of, fault) in enumerate(self._faults):
                if of == path and fault.where == where and start >= fault.from_byte:
                    if fault.times is not None:
                        fault.times -= 1
                        if not fault.times:
                            del self._faults[i]
                    return fault
        return None

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)


@contextmanager
def hub_server(**repos: Repo) -> Iterator[HubServer]:
    """A running server; repositories are named OWNER/NAME, given here as OWNER__NAME."""
    server = HubServer()
    server.repos = {name.replace("__", "/"): repo for name, repo in repos.items()}
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    """What both servers share."""

    protocol_version = "HTTP/1.1"
    where: ClassVar[Where]

    @property
    def hub(self) -> HubServer:
        return cast("_Server", self.server).hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def note(self, where: Where, path: str) -> Fault | None:
        """Remembers the request; what is to go wrong with it, unless it is only asked about."""
        asked = self.headers.get("Range")
        span = asked.removeprefix("bytes=").split("-") if asked else None
        self.hub.note(
            Seen(
                where,
                self.command,
                path,
                asked,
                self.headers.get("Authorization"),
                int(span[1]) - int(span[0]) + 1 if span and all(span) else None,
            )
        )
        return self.hub.next_fault(where, path, int(span[0]) if span else 0)

    def answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        about = {"X-Error-Code": code, "X-Error-Message": f"refused: {code}"} if code else {}
        body = json.dumps({"error": f"refused: {code or status}"}).encode()
        self.answer(status, body, {"Content-Type": "application/json", **about, **(headers or {})})

    def send_file(self, path: Path, fault: Fault | None, headers: Mapping[str, str]) -> None:
        """A file or the range that is asked for, or what `fault` makes of it."""
        path = fault.file if fault and fault.file else path
        size = path.stat().st_size
        start, stop = 0, size
        asked = self.headers.get("Range")
        if asked and not (fault and fault.ignore_range):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, size) if last else size
            if start >= size:
                self.answer(416, headers={"Content-Range": f"bytes */{size}"})
                return
        partial = asked is not None and not (fault and fault.ignore_range)
        self.send_response(206 if partial else 200)
        about = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", **headers}
        if partial:
            about["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_bytes(path, start, stop, fault)

    def _send_bytes(self, path: Path, start: int, stop: int, fault: Fault | None) -> None:
        end = stop
        for limit in (fault.cut_after_bytes, fault.stall_after_bytes) if fault else ():
            if limit is not None:
                end = min(end, start + limit)
        with path.open("rb") as stream:
            stream.seek(start)
            while start < end:
                piece = stream.read(min(PIECE_BYTES, end - start))
                self.wfile.write(piece)
                start += len(piece)
        self.wfile.flush()
        if fault and fault.stall_after_bytes is not None:
            self.hub.stalled.set()
            self.hub.woken.wait(STALL_S)
        if start < stop:
            self.close_connection = True


class _Hub(_Handler):
    """Lists, and where files are."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        match path:
            case ["api", "models", owner, name]:
                self._list(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._list(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self._tree(f"{owner}/{name}", revision)
            case ["api", "resolve-cache", "models", owner, name, _, *parts]:
                self._small(self.hub.repos[f"{owner}/{name}"], "/".join(parts))
            case [owner, name, "resolve", revision, *parts]:
                self._resolve(f"{owner}/{name}", revision, "/".join(parts))
            case _:
                self.refuse(404)

    def _list(self, name: str, revision: str) -> None:
        fault = self.note("list", "")
        repo = self._readable(name, revision, fault)
        if repo is None:
            return
        about: dict[str, Any] = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "tags": [],
        }
        if parse_qs(urlsplit(self.path).query).get("blobs"):
            about["siblings"] = repo.listing()
        self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._readable(name, revision, self.note("list", ""))
        if repo is None:
            return
        entries = []
        for sibling in repo.listing():
            entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"]}
            if lfs := sibling.get("lfs"):
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 1}
            entries.append({**entry, "oid": sibling["blobId"]})
        self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        fault = self.note("resolve", path)
        repo = self._readable(name, revision, fault)
        if repo is None:
            return
        if repo.gated and not self._lets_in(repo):
            known = self.headers.get("Authorization") is not None
            self.refuse(403 if known else 401, "GatedRepo")
            return
        commit = {"X-Repo-Commit": repo.commit}
        if not (repo.folder / path).is_file():
            self.refuse(404, "EntryNotFound", commit)
            return
        if not _is_large(path):
            here = f"/api/resolve-cache/models/{name}/{repo.commit}/{path}"
            self.answer(307, headers={"Location": here, **commit, "ETag": f'"{repo.etag(path)}"'})
            return
        size = (repo.folder / path).stat().st_size
        linked = {"X-Linked-Etag": f'"{repo.etag(path)}"', "X-Linked-Size": str(size)}
        there = f"{self.hub.content_endpoint}/content/{name}/{path}?Signature={SIGNATURE}"
        self.answer(302, headers={"Location": there, **commit, **linked})

    def _small(self, repo: Repo, path: str) -> None:
        fault = self.note("content", path)
        if fault and fault.status:
            self.refuse(fault.status, fault.code, fault.headers)
            return
        etag = {"ETag": f'"{repo.etag(path)}"', "X-Repo-Commit": repo.commit}
        self.send_file(repo.folder / path, fault, etag)

    def _readable(self, name: str, revision: str, fault: Fault | None) -> Repo | None:
        """The repository, or None when the request was refused."""
        repo = self.hub.repos.get(name)
        if fault and fault.status:
            self.refuse(fault.status, fault.code, fault.headers)
        elif repo is None or (repo.token and not repo.gated and not self._lets_in(repo)):
            # The hub tells nobody which repositories there are.
            self.refuse(401 if self.headers.get("Authorization") is None else 404, "RepoNotFound")
        elif revision not in (*repo.revisions, repo.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _lets_in(self, repo: Repo) -> bool:
        return self.headers.get("Authorization") == f"Bearer {repo.token}"


class _Content(_Handler):
    """Large files, for whoever has a signed address. A token is nothing that it asks for."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, owner, name, *parts = unquote(url.path).strip("/").split("/")
        path = "/".join(parts)
        fault = self.note("content", path)
        if fault and fault.status:
            self.refuse(fault.status, fault.code, fault.headers)
        elif parse_qs(url.query).get("Signature") != [SIGNATURE]:
            self.refuse(403)
        else:
            repo = self.hub.repos[f"{owner}/{name}"]
            self.send_file(repo.folder / path, fault, {"ETag": f'"{repo.etag(path)}"'})


def wait_until(true: Any, timeout_s: float = 30.0) -> None:
    """Until `true()` is, or AssertionError."""
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def _is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
