"""From a URL to the addresses that may be connected to, or a refusal.

What is refused says why without telling a stranger what a name of ours resolves to.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address

import httpx2

from wanfit.errors import BadSetting, BadUrl, UrlFailed
from wanfit.fetch.addresses import Address, is_public

PORTS = frozenset({80, 443, 8080, 8443})  # ours: where the web is; not mail, databases or shells
MAX_URL_CHARS = 8192  # ours: signed addresses of S3 have up to 2,000
RESOLVE_S = 10.0  # ours: twice what the resolver of glibc waits for one server
_DEFAULT_PORTS = {"http": 80, "https": 443}
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")  # parsers differ about these
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
MAX_NAME_CHARS = 253  # RFC 1035
# WHATWG: a host whose last label is a number is an IPv4 address, in many spellings: 2130706433,
# 0177.0.0.1, 0x7f.1, 127.1. We take only the one with four decimal parts.
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)")

Resolve = Callable[[str, int], Iterable[Address]]
"""The addresses of a name and a port. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Target:
    """One hop, checked: connect to `addresses` and to nothing else, ask for `host`."""

    url: httpx2.URL
    scheme: str
    host: str  # ASCII, without brackets and final dot: for TLS and the Host header
    port: int
    path: bytes  # with the query
    addresses: tuple[Address, ...]

    @property
    def authority(self) -> str:
        """As it stands in the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def _resolve(host: str, port: int) -> Sequence[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(entry[4][0]) for entry in found]


class Guard:
    """Knows which addresses may be asked.

    allowed: (host, port) pairs that may be asked wherever they lead, for tests and for services in
    the network of whoever runs this server. resolve: stands for the system's resolver.
    """

    def __init__(
        self,
        allowed: Collection[tuple[str, int]] = (),
        *,
        ports: Collection[int] = PORTS,
        resolve: Resolve = _resolve,
    ) -> None:
        self._allowed = frozenset(allowed)
        self._ports = frozenset(ports)
        self._resolve = resolve

    def parse(self, url: str) -> Target:
        """What can be said without asking a resolver; its addresses are none. Raises BadUrl."""
        target = _parsed(url)
        if target.port not in self._ports and not self._is_allowed(target):
            raise BadUrl(
                f"Port {target.port} is not asked",
                hint=f"These are: {', '.join(map(str, sorted(self._ports)))}",
            )
        literal = _literal(target.host)
        if literal is not None:
            self._check(target, [literal])
        return target

    def check(self, url: str) -> Target:
        """The target with the addresses that may be connected to, all of those that it has.

        Raises BadUrl where one of them is not public, UrlFailed where there is none.
        """
        target = self.parse(url)
        literal = _literal(target.host)
        addresses = [literal] if literal else self._addresses(target)
        self._check(target, addresses)
        return Target(
            target.url, target.scheme, target.host, target.port, target.path, tuple(addresses)
        )

    def _addresses(self, target: Target) -> list[Address]:
        """Asks the resolver, for so long. Its thread is left behind if it never answers."""
        found: list[Address] = []
        ended = threading.Event()

        def resolve() -> None:
            # A name that is too long or has an empty label is a UnicodeError.
            with suppress(OSError, UnicodeError):
                found.extend(dict.fromkeys(self._resolve(target.host, target.port)))
            ended.set()

        threading.Thread(target=resolve, name="resolve", daemon=True).start()
        if not ended.wait(RESOLVE_S) or not found:
            raise UrlFailed(f"The name {target.host[:100]!r} leads nowhere", hint="Check the URL")
        return found

    def _check(self, target: Target, addresses: Iterable[Address]) -> None:
        if self._is_allowed(target):
            return
        if not all(map(is_public, addresses)):
            raise BadUrl(
                f"{target.host[:100]!r} is not a public address of the Internet",
                hint="Give one that everybody can reach, or send the bytes themselves",
            )

    def _is_allowed(self, target: Target) -> bool:
        return (target.host, target.port) in self._allowed


def parse_allowed(text: str) -> frozenset[tuple[str, int]]:
    """Pairs from "HOST:PORT, HOST:PORT" (IPv6 in brackets), as a setting has them.

    Raises BadSetting.
    """
    pairs = set()
    for entry in filter(None, re.split(r"[,\s]+", text)):
        host, colon, port = entry.rpartition(":")
        host = host.removeprefix("[").removesuffix("]").lower().rstrip(".")
        if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise BadSetting(
                f"{entry[:100]!r} is not HOST:PORT", hint="As in minio.lan:9000, [fd00::1]:8080"
            )
        pairs.add((host, int(port)))
    return frozenset(pairs)


def _parsed(url: str) -> Target:
    if len(url) > MAX_URL_CHARS:
        raise BadUrl(f"The URL has {len(url)} characters, over the limit of {MAX_URL_CHARS}")
    if _FORBIDDEN.search(url):
        raise BadUrl("The URL has spaces, control characters or backslashes in it")
    try:
        parsed = httpx2.URL(url)
        host = parsed.raw_host.decode("ascii").lower().removesuffix(".")
        port = _DEFAULT_PORTS.get(parsed.scheme, 0) if parsed.port is None else parsed.port
    except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise BadUrl(f"{url[:100]!r} is not a URL", hint=str(error)[:200]) from None
    if parsed.scheme not in _DEFAULT_PORTS:
        raise BadUrl(
            f"The scheme of a URL is http or https, not {parsed.scheme[:20]!r}",
            hint="Give an address that begins with https://",
        )
    if parsed.userinfo:
        raise BadUrl("The URL names a user before its host", hint="Leave out what is before the @")
    if _literal(host) is None and (len(host) > MAX_NAME_CHARS or not _NAME.fullmatch(host)):
        raise BadUrl(f"{url[:100]!r} names no host of the Internet")
    if ":" not in host and _NUMBER.fullmatch(host.rpartition(".")[2]) and _literal(host) is None:
        raise BadUrl(
            f"{host[:100]!r} is an unusual spelling of an address",
            hint="An IPv4 address has four decimal parts",
        )
    return Target(parsed, parsed.scheme, host, port, parsed.raw_path, ())


def _literal(host: str) -> Address | None:
    """The address that a host is, when it is one and no name."""
    try:
        return ip_address(host) if ":" in host else IPv4Address(host)
    except ValueError:
        return None
