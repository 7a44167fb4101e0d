"""A connection that goes to the addresses that were checked, and that ends when its time is over.

httpcore2 speaks HTTP and asks a backend for its bytes; ours connects to what `guard` has checked,
whatever name it is given. The name stays in TLS and in the Host header. Every wait is cut to what
is left of the whole, so that a peer that sends a byte a second, in the headers too, gains nothing.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore2

from wanfit.fetch.guard import Target


class PinnedBackend(httpcore2.NetworkBackend):
    """Connects to the addresses of one target, in their order.

    deadline_s: of time.monotonic(), for all that is done on its connections. wait_s: the longest
    that one read or write may take.
    """

    def __init__(self, target: Target, *, deadline_s: float, wait_s: float) -> None:
        self._target = target
        self._deadline_s = deadline_s
        self._wait_s = wait_s
        self._tcp = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Ignores `host`, which was resolved and checked before."""
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._target.addresses:
            try:
                stream = self._tcp.connect_tcp(
                    str(address),
                    self._target.port,
                    left_s(self._deadline_s, self._wait_s),
                    socket_options=socket_options,
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Timed(stream, self._deadline_s, self._wait_s)
        raise failure


class _Timed(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream, deadline_s: float, wait_s: float) -> None:
        self._stream = stream
        self._deadline_s = deadline_s
        self._wait_s = wait_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, left_s(self._deadline_s, self._wait_s))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, left_s(self._deadline_s, self._wait_s))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        wait_s = left_s(self._deadline_s, self._wait_s)
        secure = self._stream.start_tls(ssl_context, server_hostname, wait_s)
        return _Timed(secure, self._deadline_s, self._wait_s)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def left_s(deadline_s: float, wait_s: float) -> float:
    """How long one wait may be. Raises ReadTimeout when the time is over."""
    left = min(wait_s, deadline_s - time.monotonic())
    if left <= 0:
        raise httpcore2.ReadTimeout("the time for the whole is over")
    return left
