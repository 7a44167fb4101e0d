"""GET and POST to checked targets, bounded in bytes and in seconds."""

from __future__ import annotations

import ssl
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import httpcore2
import httpx2

from wanfit.errors import BadImage, BadUrl, UrlFailed
from wanfit.fetch.guard import Guard, Target
from wanfit.fetch.transport import PinnedBackend
from wanfit.media import UPLOAD_LIMITS, image_kind

REDIRECTS = (301, 302, 303, 307, 308)
HEAD_BYTES = 16  # of an answer, before its kind is judged
ANSWER_BYTES = 65536  # ours: of what a webhook answers; more is not read


@dataclass(frozen=True, slots=True)
class Limits:
    """What one download may take."""

    max_bytes: int
    total_s: float = 30.0  # ours: 20 MiB at 6 Mbit/s; redirects and resolving count in
    wait_s: float = 10.0  # ours: for one connection, one read, one write
    redirects: int = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What a POST met."""

    status: int
    retry_after: str | None  # as the header has it


def download(
    url: str,
    guard: Guard,
    limits: Limits,
    *,
    judge: Callable[[bytes], None] | None = None,
) -> bytes:
    """The bytes of a URL. Redirects are followed, each checked as the first was.

    judge: is given the first bytes as soon as they came, and raises for what nobody wants.
    Raises BadUrl for what is not asked, UrlFailed for what gave nothing.
    """
    deadline_s = time.monotonic() + limits.total_s
    target = guard.check(url)
    for _ in range(limits.redirects + 1):
        with _asked("GET", target, deadline_s, limits.wait_s) as response:
            if response.status not in REDIRECTS:
                if response.status != 200:
                    raise UrlFailed(f"{target.host} answered {response.status}", hint=_CHECK)
                return _body(response, target, limits.max_bytes, judge)
            where = _header(response, b"location")
        if where is None:
            raise UrlFailed(f"{target.host} redirects without saying where", hint=_CHECK)
        target = guard.check(_joined(target.url, where))
    raise UrlFailed(f"The URL redirects more than {limits.redirects} times", hint=_CHECK)


def fetch_image(url: str, guard: Guard, *, total_s: float = 30.0) -> bytes:
    """The bytes of a picture, judged by themselves and not by what the server calls them.

    They are PNG, JPEG or WEBP by their first bytes; `media.read_upload` makes a picture of them.
    Raises BadUrl, UrlFailed, BadImage.
    """

    def judge(head: bytes) -> None:
        if image_kind(head) is None:
            raise BadImage(
                "What the URL gives is not a picture",
                hint=f"Give the address of one of {', '.join(UPLOAD_LIMITS.formats)} itself",
            )

    limits = Limits(UPLOAD_LIMITS.max_bytes, total_s)
    return download(url, guard, limits, judge=judge)


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    guard: Guard,
    *,
    total_s: float = 15.0,  # ours: what Standard Webhooks names as a sender's patience
    wait_s: float = 10.0,
) -> Answer:
    """Sends bytes to a URL; a redirect is an answer like any other and is not followed.

    Raises BadUrl, UrlFailed.
    """
    deadline_s = time.monotonic() + total_s
    target = guard.check(url)
    with _asked("POST", target, deadline_s, wait_s, headers, body) as response:
        after = _header(response, b"retry-after")
        return Answer(response.status, after)


@contextmanager
def _asked(
    method: str,
    target: Target,
    deadline_s: float,
    wait_s: float,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Iterator[httpcore2.Response]:
    """One request over a connection of its own, closed afterwards however much is unread."""
    sent = {
        "Host": target.authority,
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "User-Agent": "wanfit",
        "Connection": "close",
        **(headers or {}),
    }
    if method == "POST":
        sent["Content-Length"] = str(len(body))
    connection = httpcore2.HTTPConnection(
        origin=httpcore2.Origin(target.scheme.encode(), target.host.encode(), target.port),
        network_backend=PinnedBackend(target, deadline_s=deadline_s, wait_s=wait_s),
    )
    request = httpcore2.Request(
        method,
        httpcore2.URL(
            scheme=target.scheme.encode(),
            host=target.host.encode(),
            port=target.port,
            target=target.path,
        ),
        headers=[(name.encode(), value.encode()) for name, value in sent.items()],
        content=body,
    )
    with closing(connection), _errors(target):
        response = connection.handle_request(request)
        with closing(response):
            yield response


@contextmanager
def _errors(target: Target) -> Iterator[None]:
    """Turns what the connection meets into UrlFailed."""
    try:
        yield
    except httpcore2.TimeoutException:
        raise UrlFailed(
            f"{target.host} took too long", hint="Try again, or another place"
        ) from None
    except httpcore2.ConnectError as error:
        kind = (
            "no safe connection" if isinstance(error.__cause__, ssl.SSLError) else "no connection"
        )
        raise UrlFailed(f"There is {kind} to {target.host}", hint=_CHECK) from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError, ssl.SSLError):
        raise UrlFailed(f"{target.host} broke the connection", hint="Try again") from None


def _body(
    response: httpcore2.Response,
    target: Target,
    max_bytes: int,
    judge: Callable[[bytes], None] | None,
) -> bytes:
    length = _header(response, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise _too_large(target, max_bytes)
    got = bytearray()
    judged = judge is None
    for piece in _decoded(response, target, max_bytes):
        got += piece
        if len(got) > max_bytes:
            raise _too_large(target, max_bytes)
        if not judged and judge and len(got) >= HEAD_BYTES:
            judge(bytes(got[:HEAD_BYTES]))
            judged = True
    if not judged and judge:
        judge(bytes(got))
    return bytes(got)


def _decoded(response: httpcore2.Response, target: Target, max_bytes: int) -> Iterator[bytes]:
    """The body, unpacked where it was packed though we asked for it plain; a limit at a time."""
    encoding = (_header(response, b"content-encoding") or "identity").strip().lower()
    pieces = response.iter_stream()
    if encoding == "identity":
        yield from pieces
        return
    if encoding not in ("gzip", "x-gzip"):
        raise UrlFailed(f"{target.host} packs its answer as {encoding[:20]!r}", hint=_CHECK)
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        for packed in pieces:
            # One byte beyond the limit is enough for whoever counts.
            yield unpacker.decompress(packed, max_bytes + 1)
            if unpacker.unconsumed_tail:
                raise _too_large(target, max_bytes)
    except zlib.error:
        raise UrlFailed(f"{target.host} sent a damaged answer", hint="Try again") from None
    if not unpacker.eof:
        raise UrlFailed(f"{target.host} sent half an answer", hint="Try again")


def _header(response: httpcore2.Response, wanted: bytes) -> str | None:
    """The last header of that name."""
    found = [value for name, value in response.headers if name.lower() == wanted]
    return found[-1].decode("latin-1") if found else None


def _joined(base: httpx2.URL, where: str) -> str:
    """Where a redirect leads; a fragment or a user in it is judged like in any URL."""
    try:
        return str(base.join(where))
    except (httpx2.InvalidURL, ValueError):
        raise BadUrl("The URL redirects to something that is not a URL", hint=_CHECK) from None


def _too_large(target: Target, max_bytes: int) -> UrlFailed:
    return UrlFailed(
        f"{target.host} sends more than the limit of {max_bytes} bytes", hint="Make it smaller"
    )


_CHECK = "Check the URL with a browser that is not logged in"
