"""A server on the loopback that behaves as a stranger's might: each path another way."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Server:
    """Where it listens, and the requests that came, as they came."""

    port: int
    requests: list[bytes] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


Behave = Callable[[socket.socket, bytes], None]
"""Given a connection and the request's path, answers."""


@contextmanager
def serving(behave: Behave, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Answers each connection in a thread of its own until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(listener.getsockname()[1])

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            secure = tls.wrap_socket(connection, server_side=True) if tls else connection
            with secure:
                request = b""
                while b"\r\n\r\n" not in request:
                    piece = secure.recv(65536)
                    if not piece:
                        return
                    request += piece
                head, _, body = request.partition(b"\r\n\r\n")
                length = next(
                    (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                     if line.startswith(b"content-length:")), 0,
                )  # fmt: skip
                while len(body) < length:
                    body += secure.recv(65536)
                server.requests.append(head + b"\r\n\r\n" + body)
                behave(secure, head.split(b" ")[1])

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def reply(
    connection: socket.socket, body: bytes = b"", status: str = "200 OK", *headers: str
) -> None:
    """A whole answer with its length, unless `headers` say otherwise."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def redirect(connection: socket.socket, where: str, status: str = "302 Found") -> None:
    reply(connection, b"", status, f"Location: {where}")


def drip(connection: socket.socket, data: bytes, every_s: float) -> None:
    """One byte at a time."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(every_s)


def bomb(num_bytes: int) -> bytes:
    """So many zeros, packed to a thousandth."""
    # Without the time of packing, which would differ in the names of tests that have it in them.
    return gzip.compress(bytes(num_bytes), mtime=0)
