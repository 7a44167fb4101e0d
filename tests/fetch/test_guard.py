"""Attacks by URL: spelled, resolved, redirected, slow, swollen. Each has to end in a typed refusal.

Names resolve as the test says, connections are real ones to servers on the loopback, which count
what reaches them.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from itertools import count
from pathlib import Path

import pytest

from tests.fetch.servers import Server, bomb, drip, redirect, reply, serving
from wanfit.errors import BadImage, BadSetting, BadUrl, UrlFailed
from wanfit.fetch import Guard, Limits, download, fetch_image, parse_allowed, post
from wanfit.fetch import guard as guards
from wanfit.fetch.addresses import Address

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
SMALL = Limits(max_bytes=100_000, total_s=5, wait_s=2)


def to_public(host: str, port: int) -> list[Address]:
    """A resolver for which every name is somewhere on the Internet."""
    return [IPv4Address("8.8.8.8")]


def to(*addresses: str) -> guards.Resolve:
    return lambda host, port: [ip_address(address) for address in addresses]


class TestSpelling:
    """Refused by the URL alone. The resolver would call every name public."""

    @pytest.mark.parametrize(
        "url",
        [
            "http://2130706433/", "http://0x7f000001/", "http://017700000001/",
            "http://0177.0.0.1/", "http://0x7f.0.0.1/", "http://0x7f.1/", "http://127.1/",
            "http://127.0.1/", "http://0/", "http://127.0.0.1.nip.0x7f/", "http://1.2.3.4.5/",
            "http://127.0.0.01/", "http://00000127.0.0.1/", "http://4294967296/",
            "http://127.0.0.1/", "http://127.0.0.1./", "http://0.0.0.0/", "http://[::]/",
            "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/",
            "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fe80::1%25eth0]/",
            "http://[fe80::1%eth0]/", "http://[fe80::1]/", "http://[fd00:ec2::254]/",
            "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/",
            "http://100.100.100.200/", "http://168.63.129.16/", "http://10.0.0.1/",
            "http://192.168.1.1/", "http://172.16.0.1/", "http://224.0.0.1/",
            "http://255.255.255.255/", "http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/",
            "http://user@example.com/", "http://user:secret@example.com/",
            "http://example.com@127.0.0.1/", "http://127.0.0.1@example.com/",
            "http://example.com\\@127.0.0.1/", "http://example.com\\.evil.com/",
            "http://127.0.0.1\t/", "http://exa\nmple.com/", "http://example.com/\r\nX: y",
            " http://example.com/", "http://example.com /", "http://example.com/\0",
            "file:///etc/passwd", "gopher://example.com/", "ftp://example.com/", "dict://x:1/",
            "data:image/png;base64,AAAA", "javascript:alert(1)", "jar:http://example.com!/",
            "unix:///run/docker.sock", "//example.com/", "example.com", "/etc/passwd", "", "http:",
            "http://", "http:///x", "https://?x", "http://:80/", "http://[::1/", "http://[zz]/",
            "http://example.com:22/", "http://example.com:6379/", "http://example.com:0/",
            "http://example.com:65536/", "http://example.com:-80/", "http://example.com:80a/",
            "http://example.com:8 0/", "http://exa%6dple.com/", "http://a..b/" , "http://.../",
            "http://xn--/", "http://" + "a" * 64 + ".com/x" * 2000,
        ],
    )  # fmt: skip
    def test_is_refused(self, url: str) -> None:
        with pytest.raises(BadUrl) as raised:
            Guard(resolve=to_public).check(url)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 400

    @pytest.mark.parametrize(
        ("url", "host", "port", "authority", "path"),
        [
            ("https://example.com/a%20b?c=d#e", "example.com", 443, "example.com", b"/a%20b?c=d"),
            ("http://EXAMPLE.com.:8080", "example.com", 8080, "example.com:8080", b"/"),
            ("HTTPS://example.com:443/", "example.com", 443, "example.com", b"/"),
            ("https://bücher.example/ü", "xn--bcher-kva.example", 443, None, b"/%C3%BC"),
            ("http://8.8.8.8/", "8.8.8.8", 80, "8.8.8.8", b"/"),
            ("http://[2606:4700:4700::1111]:8080/", "2606:4700:4700::1111", 8080,
             "[2606:4700:4700::1111]:8080", b"/"),
            ("http://[::ffff:8.8.8.8]/", "::ffff:8.8.8.8", 80, None, b"/"),
            ("http://example.com/?u=http://127.0.0.1/@", "example.com", 80, None,
             b"/?u=http://127.0.0.1/@"),
        ],
    )  # fmt: skip
    def test_what_people_mean_passes(
        self, url: str, host: str, port: int, authority: str | None, path: bytes
    ) -> None:
        target = Guard(resolve=to_public).check(url)
        assert (target.host, target.port, target.path) == (host, port, path)
        assert authority in (None, target.authority)
        assert target.addresses

    def test_the_door_asks_no_resolver(self) -> None:
        def fail(host: str, port: int) -> list[Address]:
            raise AssertionError(host)

        assert Guard(resolve=fail).parse("https://example.com/").host == "example.com"
        with pytest.raises(BadUrl):
            Guard(resolve=fail).parse("https://127.0.0.1/")


class TestResolving:
    @pytest.mark.parametrize(
        "addresses",
        [
            ["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["2606:4700::1", "10.0.0.1"], ["::1"],
            ["8.8.8.8", "fe80::1%eth0"], ["::ffff:169.254.169.254"], ["64:ff9b::a00:1"],
        ],
    )  # fmt: skip
    def test_one_address_that_is_not_public_is_enough(self, addresses: list[str]) -> None:
        with pytest.raises(BadUrl, match="not a public address") as raised:
            Guard(resolve=to(*addresses)).check("http://example.com/")
        assert not any(address in str(raised.value) for address in addresses)  # tells no inside

    @pytest.mark.parametrize("host", ["localhost", "localhost.", "LOCALHOST"])
    def test_the_real_resolver_finds_this_machine_and_is_not_followed(self, host: str) -> None:
        with pytest.raises(BadUrl, match="not a public address"):
            Guard().check(f"http://{host}/")

    def test_a_name_without_an_address_leads_nowhere(self) -> None:
        def nothing(host: str, port: int) -> list[Address]:
            raise OSError("NXDOMAIN")

        for resolve in (nothing, to()):
            with pytest.raises(UrlFailed, match="leads nowhere"):
                Guard(resolve=resolve).check("http://example.com/")

    def test_a_resolver_that_hangs_does_not_hold_us(self, monkeypatch: pytest.MonkeyPatch) -> None:
        release = threading.Event()

        def hang(host: str, port: int) -> list[Address]:
            release.wait(20)
            return []

        monkeypatch.setattr(guards, "RESOLVE_S", 0.2)
        began_s = time.monotonic()
        with pytest.raises(UrlFailed, match="leads nowhere"):
            Guard(resolve=hang).check("http://example.com/")
        assert time.monotonic() - began_s < 2
        release.set()

    def test_the_name_is_resolved_once_and_the_connection_goes_there(self) -> None:
        """Rebinding: one place when it is checked, another if it were resolved again.

        Both are of the loopback, so that the test asks nobody else; nobody listens at the first.
        """
        answers = count()

        def rebind(host: str, port: int) -> list[Address]:
            return [IPv4Address("127.0.0.1" if next(answers) else "127.0.0.2")]

        with serving(lambda connection, path: reply(connection, PNG)) as server:
            guard = Guard({("name.example", server.port)}, resolve=rebind)
            with pytest.raises(UrlFailed, match="no connection"):
                download(f"http://name.example:{server.port}/", guard, SMALL)
        assert next(answers) == 1
        assert server.requests == []

    def test_the_host_header_keeps_the_name(self) -> None:
        with serving(lambda connection, path: reply(connection, PNG)) as server:
            guard = Guard({("name.example", server.port)}, resolve=to("127.0.0.1"))
            assert download(f"http://name.example:{server.port}/x", guard, SMALL) == PNG
        assert f"Host: name.example:{server.port}".encode() in server.requests[0]

    def test_the_next_address_is_tried_when_one_does_not_answer(self) -> None:
        with serving(lambda connection, path: reply(connection, PNG)) as server:
            addresses = to("127.0.0.2", "127.0.0.1")  # nobody listens on the first
            guard = Guard({("name.example", server.port)}, resolve=addresses)
            assert download(f"http://name.example:{server.port}/", guard, SMALL) == PNG


class TestRedirects:
    @pytest.fixture
    def secret(self) -> Iterator[Server]:
        """A service of the inside: nothing may reach it."""
        with serving(lambda connection, path: reply(connection, b"secret")) as server:
            yield server

    @pytest.mark.parametrize(
        "where",
        [
            "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", "http://127.0.0.1:{port}/",
            "http://localhost:{port}/", "http://2130706433:{port}/", "http://[::1]:{port}/",
            "//127.0.0.1:{port}/x", "http://169.254.169.254/latest/", "http://a@127.0.0.1:{port}/",
            "http://[::ffff:127.0.0.1]:{port}/", "http://127.0.0.1:22/", "\\\\127.0.0.1\\x", "http://[",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 T", "308 P"])
    def test_leads_nowhere_that_the_url_itself_could_not(
        self, secret: Server, where: str, status: str
    ) -> None:
        place = where.format(port=secret.port)
        with serving(lambda connection, path: redirect(connection, place, status)) as server:
            guard = Guard({("127.0.0.1", server.port)}, ports={80, secret.port})
            with pytest.raises(BadUrl):
                download(f"{server.origin}/", guard, SMALL)
        assert secret.requests == []

    def test_three_are_followed_and_a_chain_of_six_is_not(self) -> None:
        def chain(connection: object, path: bytes) -> None:
            left = int(path.removeprefix(b"/"))
            if left:
                redirect(connection, f"/{left - 1}")  # type: ignore[arg-type]
            else:
                reply(connection, PNG)  # type: ignore[arg-type]

        with serving(chain) as server:
            guard = Guard({("127.0.0.1", server.port)})
            assert download(f"{server.origin}/3", guard, SMALL) == PNG
            for length in (4, 6):
                server.requests.clear()
                with pytest.raises(UrlFailed, match="more than 3 times"):
                    download(f"{server.origin}/{length}", guard, SMALL)
                assert len(server.requests) == 4

    def test_one_without_a_place_is_an_error(self) -> None:
        with (
            serving(lambda connection, path: reply(connection, b"", "302 Found")) as server,
            pytest.raises(UrlFailed, match="without saying where"),
        ):
            download(server.origin, Guard({("127.0.0.1", server.port)}), SMALL)

    def test_a_name_is_resolved_and_checked_again_at_each_hop(self) -> None:
        """The first hop is allowed; the second is a name that has become one of the inside."""
        names: list[str] = []

        def resolve(host: str, port: int) -> list[Address]:
            names.append(host)
            return [IPv4Address("127.0.0.1" if host == "first.example" else "10.0.0.1")]

        with serving(
            lambda connection, path: redirect(connection, "http://second.example/")
        ) as to_:
            guard = Guard({("first.example", to_.port)}, resolve=resolve)
            with pytest.raises(BadUrl, match=r"second\.example"):
                download(f"http://first.example:{to_.port}/", guard, SMALL)
        assert names == ["first.example", "second.example"]


class TestAmounts:
    def fails(self, behave: object, match: str, limits: Limits = SMALL) -> float:
        """Seconds until the download failed as it should."""
        with serving(behave) as server:  # type: ignore[arg-type]
            began_s = time.monotonic()
            with pytest.raises(UrlFailed, match=match):
                download(server.origin, Guard({("127.0.0.1", server.port)}), limits)
            return time.monotonic() - began_s

    def test_a_length_over_the_limit_is_refused_before_the_body(self) -> None:
        def behave(connection: object, path: bytes) -> None:
            reply(connection, b"", "200 OK", "Content-Length: 100001")  # type: ignore[arg-type]
            time.sleep(3)

        assert self.fails(behave, "more than the limit of 100000 bytes") < 1

    @pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Connection: close"])
    def test_a_body_without_a_length_is_counted(self, length: str) -> None:
        def behave(connection: object, path: bytes) -> None:
            send = connection.sendall  # type: ignore[attr-defined]
            send(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n".encode())
            while True:
                send(b"1000\r\n" + b"x" * 4096 + b"\r\n")

        self.fails(behave, "more than the limit")

    def test_a_gzip_bomb_with_a_small_length_does_not_go_off(self) -> None:
        packed = bomb(100_000_000)
        assert len(packed) < SMALL.max_bytes
        tracemalloc.start()
        try:
            self.fails(
                lambda connection, path: reply(
                    connection, packed, "200 OK", "Content-Encoding: gzip"
                ),
                "more than the limit",
            )
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()

    def test_a_packed_picture_is_unpacked(self) -> None:
        import gzip

        packed = gzip.compress(PNG)
        with serving(
            lambda connection, path: reply(connection, packed, "200 OK", "Content-Encoding: gzip")
        ) as server:
            assert download(server.origin, Guard({("127.0.0.1", server.port)}), SMALL) == PNG
        assert b"Accept-Encoding: identity" in server.requests[0]

    @pytest.mark.parametrize(
        ("body", "encoding"), [(bomb(1000)[:-4], "gzip"), (b"nonsense", "gzip"), (PNG, "br, gzip")]
    )
    def test_a_packing_that_is_damaged_or_unknown_is_an_error(
        self, body: bytes, encoding: str
    ) -> None:
        self.fails(
            lambda connection, path: reply(
                connection, body, "200 OK", f"Content-Encoding: {encoding}"
            ),
            "damaged|half|packs",
        )

    def test_a_byte_now_and_then_gains_no_time(self) -> None:
        limits = Limits(100_000, total_s=0.7, wait_s=0.4)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"

        def slow_body(connection: object, path: bytes) -> None:
            connection.sendall(head)  # type: ignore[attr-defined]
            drip(connection, b"x" * 9999, 0.05)  # type: ignore[arg-type]

        def slow_head(connection: object, path: bytes) -> None:
            drip(connection, head, 0.05)  # type: ignore[arg-type]

        for behave in (slow_body, slow_head):
            assert 0.6 < self.fails(behave, "took too long", limits) < 1.2
        assert self.fails(lambda connection, path: time.sleep(2), "took too long", limits) < 0.7

    def test_headers_without_end_are_not_read_to_the_end(self) -> None:
        def behave(connection: object, path: bytes) -> None:
            send = connection.sendall  # type: ignore[attr-defined]
            send(b"HTTP/1.1 200 OK\r\n")
            while True:
                send(b"X: " + b"y" * 1000 + b"\r\n")

        assert self.fails(behave, "broke the connection") < 2

    @pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
    def test_what_is_not_http_is_an_error(self, answer: bytes) -> None:
        self.fails(lambda connection, path: connection.sendall(answer), "broke the connection")

    def test_a_body_that_is_cut_is_an_error(self) -> None:
        self.fails(
            lambda connection, path: reply(connection, PNG, "200 OK", "Content-Length: 999"),
            "broke the connection",
        )

    @pytest.mark.parametrize("status", ["204 No", "206 Part", "304 Not", "404 Not", "500 Oops"])
    def test_another_status_is_an_error_that_names_it(self, status: str) -> None:
        self.fails(lambda connection, path: reply(connection, b"", status), status[:3])


class TestPictures:
    @pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "application/x-sh", ""])
    def test_bytes_count_and_not_what_they_are_called(self, kind: str) -> None:
        with serving(
            lambda connection, path: reply(connection, PNG, "200 OK", f"Content-Type: {kind}")
        ) as server:
            assert fetch_image(server.origin, Guard({("127.0.0.1", server.port)})) == PNG

    @pytest.mark.parametrize(
        "body", [b"", b"GIF89a" + bytes(99), b"<svg/>" + b" " * 99, b"RIFF0000WAVE" + bytes(99)]
    )
    def test_what_is_called_a_picture_and_is_none_is_refused(self, body: bytes) -> None:
        with (
            serving(
                lambda connection, path: reply(
                    connection, body, "200 OK", "Content-Type: image/png"
                )
            ) as server,
            pytest.raises(BadImage, match="not a picture"),
        ):
            fetch_image(server.origin, Guard({("127.0.0.1", server.port)}))

    def test_what_is_no_picture_is_given_up_after_its_first_bytes(self) -> None:
        sent = 0

        def behave(connection: object, path: bytes) -> None:
            nonlocal sent
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")  # type: ignore[attr-defined]
            while True:
                connection.sendall(b"<html>" * 1000)  # type: ignore[attr-defined]
                sent += 6000

        with serving(behave) as server, pytest.raises(BadImage, match="not a picture"):
            fetch_image(server.origin, Guard({("127.0.0.1", server.port)}))
        time.sleep(0.1)
        assert sent < 8_000_000  # what the kernel's buffers hold


class TestSurroundings:
    def test_proxies_of_the_environment_are_not_asked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            serving(lambda connection, path: reply(connection, b"by the proxy")) as proxy,
            serving(lambda connection, path: reply(connection, PNG)) as server,
        ):
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.origin)
            monkeypatch.delenv("no_proxy", raising=False)
            assert download(server.origin, Guard({("127.0.0.1", server.port)}), SMALL) == PNG
        assert proxy.requests == []

    def test_no_cookie_key_or_referer_is_sent(self) -> None:
        with serving(lambda connection, path: reply(connection, PNG)) as server:
            download(server.origin, Guard({("127.0.0.1", server.port)}), SMALL)
        names = {line.split(b":")[0].lower() for line in server.requests[0].split(b"\r\n")[1:]}
        wanted = {b"host", b"accept", b"accept-encoding", b"user-agent", b"connection", b""}
        assert names == wanted

    def test_the_allow_list_is_of_one_host_and_one_port(self) -> None:
        guard = Guard({("127.0.0.1", 9000)})
        assert guard.check("http://127.0.0.1:9000/").addresses == (IPv4Address("127.0.0.1"),)
        for url in ("http://127.0.0.1:9001/", "http://127.0.0.2:9000/", "http://127.0.0.1/"):
            with pytest.raises(BadUrl):
                guard.check(url)

    def test_the_allow_list_as_a_setting(self) -> None:
        text = "127.0.0.1:8080, Minio.LAN.:9000 [fd00::1]:80"
        pairs = {("127.0.0.1", 8080), ("minio.lan", 9000), ("fd00::1", 80)}
        assert parse_allowed(text) == pairs
        assert parse_allowed("") == frozenset()
        for wrong in ("localhost", ":80", "a:0", "a:65536", "a:x", "http://a:80/", "a:²"):
            with pytest.raises(BadSetting, match="HOST:PORT"):
                parse_allowed(wrong)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of name.example, self-signed."""
    if shutil.which("openssl") is None:  # ca-certificates of Debian brings it
        pytest.skip("this machine has no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=name.example", "-addext", "subjectAltName=DNS:name.example",
         "-days", "2", "-keyout", path, "-out", path.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    with path.open("a") as both:
        both.write(path.with_suffix(".crt").read_text())
    return path


class TestTls:
    def asked(self, certificate: Path, host: str, seen: list[str | None]) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda connection, name, _: seen.append(name)
        with serving(lambda connection, path: reply(connection, PNG), context) as server:
            guard = Guard({(host, server.port)}, resolve=to("127.0.0.1"))
            return download(f"https://{host}:{server.port}/", guard, SMALL)

    def test_the_name_is_in_the_handshake_and_is_what_the_certificate_must_say(
        self, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str | None] = []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
        assert self.asked(certificate, "name.example", seen) == PNG
        assert seen == ["name.example"]
        with pytest.raises(UrlFailed, match="no safe connection"):
            self.asked(certificate, "other.example", seen)

    def test_a_certificate_that_nobody_vouches_for_is_refused(self, certificate: Path) -> None:
        with pytest.raises(UrlFailed, match="no safe connection"):
            self.asked(certificate, "name.example", [])


class TestPost:
    def test_a_redirect_is_not_followed(self) -> None:
        with serving(lambda connection, path: redirect(connection, "/elsewhere")) as server:
            guard = Guard({("127.0.0.1", server.port)})
            assert post(server.origin, b"{}", {"X-A": "b"}, guard).status == 302
        assert len(server.requests) == 1
        assert server.requests[0].startswith(b"POST / HTTP/1.1\r\n")
        assert b"X-A: b" in server.requests[0]
        assert server.requests[0].endswith(b"\r\n\r\n{}")

    def test_the_inside_is_not_reached(self) -> None:
        with (
            serving(lambda connection, path: reply(connection)) as server,
            pytest.raises(BadUrl),
        ):
            post(server.origin, b"{}", {}, Guard(ports={server.port}))
        assert server.requests == []
