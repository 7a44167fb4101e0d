"""uvicorn's HTTP parser with bounds on what comes before a body: bytes, count, and time.

uvicorn bounds none of the three, so one client could fill the memory with headers, or hold a
connection open with a header that never ends. A connection that breaks a bound is answered and
closed. Bodies are bounded by the gate.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # as h11 by default (its max_incomplete_event_size is 100 KiB); nginx 32
MAX_HEADERS = 100  # as Apache's LimitRequestFields
HEAD_S = 15.0  # ours: nginx gives 60, Apache 20

_REFUSAL = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%s"
)


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True  # what comes next belongs to a head
    _head_begun = False
    _was_whole = False  # whether a request ended in the bytes that came last
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head and self._head_timer is None:
            self._wait_for_head()  # the first byte of the next request of this connection
        self._was_whole = False
        super().data_received(data)
        if self._head_begun and self._head_timer is None and not self._refused:
            self._wait_for_head()  # it came in the same bytes as the one before
        if self._in_head and not self._was_whole and not self._refused:
            self._head_bytes += len(data)  # a head in many pieces counts as it comes
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", b"headers_too_large")

    def on_message_begin(self) -> None:
        self._in_head = self._head_begun = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_HEAD_BYTES:
            self._refuse(b"414 URI Too Long", b"url_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        size = sum(len(part) for header in self.headers[-1:] for part in header)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large", b"headers_too_large")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_begun, self._head_bytes = False, False, 0
        self._stop_timer()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()
        self._in_head, self._was_whole, self._head_bytes = True, True, 0

    def _wait_for_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(b"408 Request Timeout", b"head_too_slow")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes, code: bytes) -> None:
        """Answers once and closes. Nothing that still comes is read."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete:
            words = status.split(b" ", 1)[1]
            body = b'{"error": {"code": "%s", "message": "%s", "hint": ""}}' % (code, words)
            self.transport.write(_REFUSAL % (status, len(body), body))
        self.transport.close()


def protocol_options() -> dict[str, Any]:
    """What uvicorn's Config is told of it."""
    return {"http": BoundedHttp, "loop": "uvloop", "ws": "none"}
