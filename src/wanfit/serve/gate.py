"""What every request passes before a face sees it, in this order, and what every answer carries.

    request id -> host, origin -> announced length -> key -> rate -> body, bounded in bytes and time

A body is read whole here, within its bounds, so that no face can forget them; what is refused is
answered before one byte of the body is read. An error that nobody foresaw becomes a 500 without a
traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanfit.errors import WanfitError
from wanfit.serve.keys import Keyring
from wanfit.serve.limits import Buckets
from wanfit.serve.problems import Problem, face_of, internal_problem, problem_of
from wanfit.settings import Limits, Settings

log = logging.getLogger("wanfit.serve")

# Of the largest size that is let in, in memory at once; ours: a quarter of a GB by default.
BODIES_IN_MEMORY = 8
OPEN_PATHS = ("/livez", "/readyz", "/openapi.json", "/docs", "/v1/files/")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\](:\d{1,5})?|[A-Za-z0-9._-]{1,253}(:\d{1,5})?")

# A clip or JSON is never a page of ours: nothing in it may run, be framed, or be guessed at.
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the id of an API key, or "" where no key is asked for."""

    id: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of a request that the gate looks at, by name in small letters."""

    values: dict[bytes, bytes]
    repeated: frozenset[bytes]

    @classmethod
    def of(cls, scope: Scope) -> Headers:
        values: dict[bytes, bytes] = {}
        repeated = set()
        for name, value in scope["headers"]:
            if name in values:
                repeated.add(name)
            values.setdefault(name, value)
        return cls(values, frozenset(repeated))

    def text(self, name: bytes) -> str:
        return self.values.get(name, b"").decode("latin-1")


class Gate:
    """The outermost ASGI application."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keyring: Keyring,
        watch: Callable[[Scope, int, float], None] = lambda scope, status, elapsed_s: None,
    ) -> None:
        """watch: told the status and the seconds of every answer."""
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._watch = watch
        self._hosts = _own_hosts(settings)
        self._requests = Buckets()
        self._body_bytes = 0  # of all bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        headers = Headers.of(scope)
        request_id = _request_id(headers)
        reply = _Reply(send, self._reply_headers(request_id, headers))
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self._pass(scope, headers, receive, reply)
        except Exception as error:  # noqa: BLE001  the last place that can turn it into an answer
            await self._answer_error(scope, error, reply, request_id)
        finally:
            self._watch(scope, reply.status, time.perf_counter() - began_s)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        origin = self._check_host_and_origin(scope["method"], headers)
        if scope["method"] == "OPTIONS" and origin:
            await reply.empty(204, _preflight_headers(headers))
            return
        announced = self._announced_bytes(headers)
        if not scope["path"].startswith(OPEN_PATHS):
            caller = self._caller(headers)
            wait_s = self._requests.take(caller.id, caller.limits.requests_per_s)
            if wait_s:
                raise too_many("requests", wait_s)
            scope["state"]["caller"] = caller
        if announced == 0 and b"transfer-encoding" not in headers.values:
            await self._app(scope, receive, reply)
            return
        room_bytes = self._settings.max_body_bytes if announced is None else announced
        if self._body_bytes + room_bytes > BODIES_IN_MEMORY * self._settings.max_body_bytes:
            raise Problem(
                503, "busy", "Too many large requests at once", headers={"retry-after": "1"}
            )
        self._body_bytes += room_bytes
        try:
            body = await self._body(receive, announced)
            self._body_bytes -= room_bytes - len(body)  # a reply may take minutes
            room_bytes = len(body)
            await self._app(scope, _again(body, receive), reply)
        finally:
            self._body_bytes -= room_bytes

    def _check_host_and_origin(self, method: str, headers: Headers) -> bool:
        """Whether the request comes from another origin, one that is let in.

        Host: a page whose name was made to point to 127.0.0.1 still sends its own name.
        Origin: a page may send a POST to anywhere; browsers say where it came from.
        """
        host = headers.text(b"host")
        if b"host" in headers.repeated or (host and not _HOST.fullmatch(host)):
            raise Problem(400, "bad_host", "The Host header is not a name")
        name = _name_of(host)
        if self._hosts is not None and name not in self._hosts:
            raise Problem(
                421, "unknown_host", f"This server is not {name[:100]!r}",
                hint="WANFIT_ALLOWED_HOSTS lets in other names",
            )  # fmt: skip
        origin = headers.text(b"origin")
        if not origin:
            foreign = headers.text(b"sec-fetch-site") == "cross-site"
            followed = method == "GET" and headers.text(b"sec-fetch-mode") == "navigate"
            if foreign and not followed and self._settings.is_loopback:
                raise _foreign_origin("another site")
            return False
        if origin in self._settings.cors_origins:
            return True
        if urlsplit_safe(origin) == host.lower():
            return False
        raise _foreign_origin(origin)

    def _announced_bytes(self, headers: Headers) -> int | None:
        """The length of the body as announced; None: it comes in chunks."""
        encoding = headers.text(b"content-encoding").lower()
        if encoding not in ("", "identity"):
            raise Problem(415, "unsupported_encoding", f"A body in {encoding[:40]!r} is not read")
        if b"transfer-encoding" in headers.values:
            return None
        text = headers.text(b"content-length") or "0"
        if b"content-length" in headers.repeated or not text.isdecimal() or len(text) > 18:
            raise Problem(400, "bad_length", "The Content-Length header is not a number")
        if int(text) > self._settings.max_body_bytes:
            raise self._too_large(int(text))
        return int(text)

    def _caller(self, headers: Headers) -> Caller:
        if not self._keyring.asks:
            return Caller("", self._settings.limits)
        scheme, _, text = headers.text(b"authorization").partition(" ")
        sent = text.strip() if scheme.lower() == "bearer" else scheme  # RunPod's may be raw
        key = self._keyring.find(sent)
        if key is None:
            what = "is not known" if sent else "is missing"
            raise Problem(
                401, "invalid_api_key", f"The API key {what}",
                hint="Send it as Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return Caller(key.id, key.limits)

    async def _body(self, receive: Receive, announced: int | None) -> bytes:
        """All of it. A client that is slow, or that sends more than it may, is refused."""
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "incomplete", "The request ended before its body did")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self._settings.max_body_bytes:
                        raise self._too_large(size)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise Problem(
                408, "body_too_slow",
                f"After {self._settings.body_s:g} s {size} bytes of the body had come"
                + ("" if announced is None else f", of {announced}"),
            ) from None  # fmt: skip

    def _too_large(self, size: int) -> Problem:
        return Problem(
            413, "body_too_large",
            f"The body has {size} bytes or more, over the limit of {self._settings.max_body_bytes}",
            hint="Send a smaller picture, or its address",
        )  # fmt: skip

    def _reply_headers(self, request_id: str, headers: Headers) -> list[tuple[bytes, bytes]]:
        own = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
        origin = headers.text(b"origin")
        if origin and origin in self._settings.cors_origins:
            own += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", b"x-request-id, openai-poll-after-ms, etag"),
                (b"vary", b"origin"),
            ]
        return own

    async def _answer_error(
        self, scope: Scope, error: Exception, reply: _Reply, request_id: str
    ) -> None:
        match error:
            case Problem():
                problem = error
            case WanfitError():
                problem = problem_of(error)
            case _:
                problem = internal_problem()
                log.exception("request %s: %s %s", request_id, scope["method"], scope["path"])
        if reply.is_whole:
            return
        if reply.status:  # it has begun, and cannot be taken back: the connection is cut
            raise error
        await reply.error(problem, problem.body(face_of(scope["path"]), request_id))


class _Reply:
    """`send` with the headers that every answer has, and the status that went out."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.status = 0  # none yet
        self.is_whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name for name, _ in message["headers"]}
            kept = [header for header in self._headers if header[0] not in given]
            message = {**message, "headers": [*message["headers"], *kept]}
        elif not message.get("more_body", False):
            self.is_whole = True
        await self._send(message)

    async def empty(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        await self({"type": "http.response.start", "status": status, "headers": list(headers)})
        await self({"type": "http.response.body", "body": b""})

    async def error(self, problem: Problem, body: dict[str, Any]) -> None:
        """Refusals close the connection: a body that nobody reads may be on its way."""
        content = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            *((name.encode(), value.encode()) for name, value in problem.headers.items()),
        ]
        if problem.status in (400, 401, 403, 408, 413, 415, 421, 503):
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self({"type": "http.response.body", "body": content})


def too_many(what: str, wait_s: float) -> Problem:
    """For a caller that asks faster than its key may."""
    return Problem(
        429, "rate_limited", f"Too many {what} from this key",
        hint=f"Again in {wait_s:.1f} s",
        headers={"retry-after": str(max(1, round(wait_s + 0.5))),
                 "retry-after-ms": str(round(1000 * wait_s) + 1)},
    )  # fmt: skip


def urlsplit_safe(origin: str) -> str | None:
    """The host and port of an origin; None where it has none, as "null"."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _foreign_origin(origin: str) -> Problem:
    return Problem(
        403, "foreign_origin", f"Pages of {origin[:100]!r} may not use this server",
        hint="WANFIT_CORS_ORIGINS lets in other origins",
    )  # fmt: skip


def _own_hosts(settings: Settings) -> frozenset[str] | None:
    """The names that this server answers to; None: any, since a key is asked for."""
    given = [_name_of(host) for host in settings.allowed_hosts]
    if settings.public_url:
        given.append(_name_of(urlsplit(settings.public_url).netloc))
    if settings.is_loopback:
        return frozenset([*given, *LOOPBACK_NAMES, settings.host.lower()])
    return frozenset(given) if settings.allowed_hosts else None


def _name_of(host: str) -> str:
    """A Host header without its port."""
    host = host.lower().rstrip(".")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _request_id(headers: Headers) -> str:
    """The client's own, where it is harmless in a log; else a new one."""
    given = headers.text(b"x-request-id")
    return given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _preflight_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (
            b"access-control-allow-headers",
            b"authorization, content-type, idempotency-key, last-event-id",
        ),
        (b"access-control-max-age", b"600"),
    ]


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then what the client does."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
