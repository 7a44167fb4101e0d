"""A table of attacks on the HTTP side, each on a real socket. Addresses: tests/fetch."""

from __future__ import annotations

import hmac
import io
import json
import re
import socket
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.serve.harness import TINY, Running, running, talk, wait_until
from wanfit.serve import protocol
from wanfit.serve.keys import KeyFile, Keyring
from wanfit.settings import Limits

KEY = "wf_test_key_of_the_environment_0123456789"
LEAKS = re.compile(r"Traceback|File \"|\.py\b|site-packages|sqlalchemy", re.IGNORECASE)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def request_of(target: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class TestBrowsers:
    """A page of another site must not use a server on this machine."""

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"]
    )
    def test_rebinding_a_name_to_this_machine_does_not_help(
        self, open_server: Running, host: str
    ) -> None:
        """DNS leads the page here, and its Host header still says whose it is."""
        answer = talk(
            open_server.port,
            f"GET /v1/jobs HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(),
        )
        assert status_of(answer) == 421

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:80", "LOCALHOST:1", ""])
    def test_our_own_names_are_served(self, open_server: Running, host: str) -> None:
        line = f"Host: {host}\r\n" if host else ""
        text = f"GET /v1/jobs HTTP/1.{1 if host else 0}\r\n{line}Connection: close\r\n\r\n"
        expected = 200 if host else 421
        assert status_of(talk(open_server.port, text.encode())) == expected

    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://localhost:1"},
            {"origin": "http://[::1"},
            {"sec-fetch-site": "cross-site"},
        ],
    )
    def test_a_page_of_another_origin_cannot_post(
        self, client: httpx2.Client, headers: dict[str, str]
    ) -> None:
        """A form or fetch() may send a POST anywhere, as text/plain without asking first."""
        body = json.dumps({"input": {"prompt": "x", **TINY}})
        reply = client.post("/run", content=body, headers={"content-type": "text/plain", **headers})
        assert reply.status_code == 403

    def test_our_own_pages_may(self, open_server: Running, client: httpx2.Client) -> None:
        assert client.get("/v1/jobs", headers={"origin": open_server.url}).status_code == 200
        followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert client.get("/v1/jobs", headers=followed).status_code == 200

    def test_cors_is_off_and_is_on_for_those_that_are_named(
        self, client: httpx2.Client, tmp_path: Path
    ) -> None:
        asking = {
            "origin": "https://app.example", "access-control-request-method": "POST",
        }  # fmt: skip
        reply = client.options("/run", headers=asking)
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
        named = running(tmp_path, cors_origins=("https://app.example",), api_key=KEY)
        with named as server, server.client() as app:
            reply = app.options("/run", headers=asking)
            assert reply.status_code == 204
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            assert "access-control-allow-credentials" not in reply.headers
            refused = app.get("/v1/jobs", headers={"origin": "https://app.example"})
            assert refused.status_code == 401, "a preflight passes, the request needs its key"
            other = {**asking, "origin": "https://app.example.evil"}
            assert app.options("/run", headers=other).status_code == 403

    def test_every_answer_is_inert(self, client: httpx2.Client) -> None:
        for path in ("/livez", "/v1/jobs", "/v1/jobs/none", "/nowhere", "/metrics"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff", path
            assert "frame-ancestors 'none'" in headers["content-security-policy"], path
            assert headers["x-request-id"], path
            assert "server" not in headers, path


class TestSize:
    def test_an_announced_body_that_is_too_large_is_refused_unread(
        self, open_server: Running
    ) -> None:
        began_s = time.monotonic()
        answer = talk(
            open_server.port,
            request_of("/run", f"Content-Length: {10**12}", method="POST"),
        )
        assert status_of(answer) == 413
        assert time.monotonic() - began_s < 5

    def test_a_body_in_chunks_that_never_ends_is_cut(self, tmp_path: Path) -> None:
        with running(tmp_path, max_body_bytes=100_000) as server:
            chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
            head = request_of("/run", "Transfer-Encoding: chunked", method="POST")
            assert status_of(talk(server.port, head + chunk * 20)) == 413

    def test_a_multipart_body_that_is_too_large_is_refused(self, tmp_path: Path) -> None:
        """Of any kind: one large file, a thousand files, a thousand fields, a huge field."""
        with running(tmp_path, max_body_bytes=3_000_000) as server, server.client() as client:
            post = "/v1/videos"
            large = {"input_reference": ("x.png", b"x" * 4_000_000)}
            assert client.post(post, files=large).status_code == 413
            files = [("input_reference", (f"{i}.png", b"x")) for i in range(1000)]
            assert client.post(post, files=files).status_code == 400
            fields = {f"field{i}": "x" for i in range(1000)}
            one = {"input_reference": ("x.png", b"x")}
            assert client.post(post, data=fields, files=one).status_code == 400
            reply = client.post(post, data={"prompt": "x" * 2_000_000}, files=one)
            assert reply.status_code == 400

    @pytest.mark.parametrize(
        "body",
        [
            b"--b",
            b"--b\r\n\r\n\r\n--b--",
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
            b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx',
            b"\x00" * 1000,
            b"--b\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n--b--",
            b"--b\r\n" + b"A" * 100_000 + b": b\r\n\r\nx\r\n--b--",
        ],
    )
    @pytest.mark.parametrize("boundary", ["b", "", "x" * 300])
    def test_a_form_that_is_malformed_is_a_400(
        self, client: httpx2.Client, body: bytes, boundary: str
    ) -> None:
        kind = f"multipart/form-data; boundary={boundary}"
        reply = client.post("/v1/videos", content=body, headers={"content-type": kind})
        assert reply.status_code == 400
        assert not LEAKS.search(reply.text)

    @pytest.mark.parametrize("charset", ["punycode", "idna", "zlib_codec", "utf-16", "rot13"])
    def test_a_form_in_an_odd_charset_is_refused(self, client: httpx2.Client, charset: str) -> None:
        """Some of Python's codecs take time that grows with the square of the text."""
        kind = f"multipart/form-data; boundary=b; charset={charset}"
        reply = client.post("/v1/videos", content=b"--b--", headers={"content-type": kind})
        assert reply.status_code == 415

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
    def test_no_body_is_decompressed(self, client: httpx2.Client, encoding: str) -> None:
        headers = {"content-encoding": encoding}
        reply = client.post("/run", content=zlib.compress(b"{}"), headers=headers)
        assert reply.status_code == 415

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000,
            '{"a":' * 50_000,
            "1" * 10_000,
            '{"prompt": ' + "9" * 5000 + "}",
            '{"input": {"prompt": "\\u0000"}}',
            '{"input": {"prompt": "\\ud800"}}',
            '{"input": {"prompt": NaN}}',
            '{"input": {"prompt": "x", "seed": 1e999}}',
            "nul",
            "[]",
        ],
    )
    @pytest.mark.parametrize("path", ["/run", "/v1/videos", "/v1/plan", "/v1/jobs"])
    def test_json_that_hurts_parsers_is_a_400(
        self, client: httpx2.Client, path: str, text: str
    ) -> None:
        reply = client.post(path, content=text.encode("utf-8", "surrogatepass"))
        assert reply.status_code == 400, reply.text
        assert not LEAKS.search(reply.text)

    def test_a_backslash_before_u0000_is_text(self, open_server: Running) -> None:
        with open_server.client() as client:
            body = {"input": {"prompt": "\\u0000 \\\\u0000", **TINY}}
            reply = client.post("/run", json=body)
            assert reply.status_code == 200
            assert open_server.finish().request["prompt"] == "\\u0000 \\\\u0000"


class TestTime:
    def test_a_body_that_drips_is_cut_off(self, tmp_path: Path) -> None:
        """A byte now and then keeps no connection open beyond the limit."""
        with running(tmp_path, body_s=0.5) as server:
            began_s = time.monotonic()
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as drip:
                drip.sendall(request_of("/run", "Content-Length: 1000", method="POST"))
                drip.settimeout(0.1)
                answer = b""
                while not answer and time.monotonic() - began_s < 5:
                    try:
                        drip.sendall(b"x")
                        answer = drip.recv(4096)
                    except TimeoutError:
                        continue
            assert status_of(answer) == 408
            assert time.monotonic() - began_s < 3

    def test_a_head_that_drips_is_cut_off(
        self, open_server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Slowloris; and a connection that says nothing at all."""
        monkeypatch.setattr(protocol, "HEAD_S", 0.3)
        for first in (b"GET /livez HTTP/1.1\r\nHost: local", b""):
            began_s = time.monotonic()
            answer = talk(open_server.port, first)
            assert status_of(answer) == 408
            assert time.monotonic() - began_s < 3

    def test_a_second_request_that_drips_on_the_same_connection_is_cut_off_too(
        self, open_server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(protocol, "HEAD_S", 0.3)
        whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = talk(open_server.port, whole + b"GET /livez HTT")
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"408 Request Timeout" in answer

    def test_many_slow_clients_hold_up_nobody(self, open_server: Running) -> None:
        """200 connections with half a request; another client is answered at once."""
        slow = [socket.create_connection(("127.0.0.1", open_server.port)) for _ in range(200)]
        try:
            for connection in slow:
                connection.sendall(request_of("/run", "Content-Length: 9", method="POST"))
            with open_server.client() as client:
                began_s = time.monotonic()
                assert client.get("/v1/jobs").status_code == 200
                assert time.monotonic() - began_s < 1
        finally:
            for connection in slow:
                connection.close()


class TestHeaders:
    @pytest.mark.parametrize(
        ("head", "expected"),
        [
            (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: local host\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: user@localhost\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: localhost/../x\r\n\r\n", 400),
            (b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n", 400),
            (b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
             b"Content-Length: 3\r\n\r\n{}", 400),
            (b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
             b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", 400),
            (b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n", 400),
            (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 60, 400),
            (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500 + b"\r\n", 431),
            (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 431),
            (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000, 431),
            (b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        ],
    )  # fmt: skip
    def test_a_head_that_is_not_one_is_refused(
        self, open_server: Running, head: bytes, expected: int
    ) -> None:
        """Two lengths among them, by which a proxy and we could see different requests."""
        head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        answer = talk(open_server.port, head)
        assert status_of(answer) == expected, answer[:200]

    def test_a_large_body_after_a_small_head_is_no_large_head(self, open_server: Running) -> None:
        """And the next request of the same connection is read."""
        with open_server.client() as client:
            for _ in range(3):
                body = {"input": {"prompt": "x", "image": "A" * 200_000}}
                assert client.post("/run", json=body).status_code == 400

    def test_a_request_id_goes_nowhere_but_back(self, client: httpx2.Client) -> None:
        assert client.get("/livez", headers={"x-request-id": "mine-1"}).headers[
            "x-request-id"
        ] == "mine-1"  # fmt: skip
        for bad in ("a b", "x" * 100, "%0d%0a", 'a"b', "é"):
            headers = {b"x-request-id": bad.encode("latin-1")}
            reply = client.get("/livez", headers=headers)
            assert reply.headers["x-request-id"].startswith("req_")

    def test_a_retry_count_of_any_length_is_harmless(self, client: httpx2.Client) -> None:
        for count in ("9" * 5000, "-1", "1e9", "²"):
            headers = {b"x-stainless-retry-count": count.encode("latin-1")}
            reply = client.post("/v1/videos", json={"colour": 1}, headers=headers)
            assert reply.status_code == 400


class TestPaths:
    @pytest.mark.parametrize(
        "job_id",
        [
            "..", "../..", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "a%00b", "%00", "a.b", ".",
            "x" * 90, "x" * 5000, "%ff%fe", "a%0d%0aSet-Cookie:x", "' or 1=1--", "%u2215", "~",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(
        "path",
        ["/status/{}", "/v1/jobs/{}", "/v1/videos/{}", "/v1/videos/{}/content", "/stream/{}",
         "/v1/jobs/{}/events", "/v1/files/{}/video"],
    )  # fmt: skip
    def test_an_id_that_is_none_leads_nowhere(
        self, open_server: Running, path: str, job_id: str
    ) -> None:
        target = path.format(job_id).replace(" ", "%20")
        answer = talk(open_server.port, request_of(target))
        assert status_of(answer) in (400, 403, 404, 405, 307), answer[:300]
        assert b"root:" not in answer
        assert b"\r\nset-cookie" not in answer.lower()
        assert not LEAKS.search(answer.decode("latin-1"))

    @pytest.mark.parametrize(
        "name", ["../../../../tmp/owned", "/etc/passwd", "a\x00b.png", "x" * 3000, "a/b\\c.png"]
    )
    def test_a_file_name_of_the_client_s_is_never_used(
        self, open_server: Running, name: str
    ) -> None:
        """Neither on disk nor in a reply."""
        data = io.BytesIO()
        Image.new("RGB", (64, 64)).save(data, format="PNG")
        with open_server.client() as client:
            reply = client.post(
                "/v1/videos",
                data={"prompt": "x", "size": "64x64", "num_frames": "5"},
                files={"input_reference": (name, data.getvalue(), "image/png")},
            )
            assert reply.status_code == 200, reply.text
            job = open_server.finish()
            assert job.result is not None
            assert job.result.key.startswith(job.id)
            served = client.get(f"/v1/videos/{job.id}/content")
            assert served.headers["content-disposition"] == f'inline; filename="{job.id}.mp4"'

    def test_a_link_opens_what_it_was_made_for_and_nothing_else(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = client.post("/v1/jobs", json={"prompt": "x", **TINY}).json()
        other = client.post("/v1/jobs", json={"prompt": "y", **TINY}).json()
        open_server.finish()
        open_server.finish()
        url = client.get(f"/v1/jobs/{job['id']}").json()["video"]["urls"]["video"]
        assert httpx2.get(url).status_code == 200
        bad = [
            url.replace(job["id"], other["id"]),
            url.replace("/video?", "/thumbnail?"),
            re.sub(r"end=\d+", "end=99999999999", url),
            re.sub(r"end=\d+", "end=1", url),
            url[:-1] + ("0" if url[-1] != "0" else "1"),
            url.partition("&")[0],
            url.partition("?")[0],
            url + "é",
        ]
        for wrong in bad:
            assert httpx2.get(wrong).status_code == 403, wrong

    def test_a_link_is_over_after_a_while(self, tmp_path: Path) -> None:
        with running(tmp_path, url_s=1) as server, server.client() as client:
            job = client.post("/v1/jobs", json={"prompt": "x", **TINY}).json()
            server.finish()
            url = client.get(f"/v1/jobs/{job['id']}").json()["video"]["urls"]["video"]
            assert httpx2.get(url).status_code == 200
            wait_until(lambda: httpx2.get(url).status_code == 403, 5)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\x00" * 1_000_000, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


class TestPictures:
    @pytest.mark.parametrize(
        "data",
        [
            bomb(50_000, 50_000),
            bomb(2**31 - 1, 2**31 - 1),
            bomb(20_000, 20_000),
            bomb(100, 100)[:60],
            b"GIF89a" + b"\x00" * 100,
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"",
        ],
    )
    def test_a_picture_that_is_a_bomb_or_none_is_refused(
        self, client: httpx2.Client, data: bytes
    ) -> None:
        """By its header, before a pixel is decoded, and by three decoders only."""
        import base64

        began_s = time.monotonic()
        body = {"prompt": "x", "image_base64": base64.b64encode(data).decode() or "====", **TINY}
        reply = client.post("/run", json={"input": body})
        assert reply.status_code == 400, reply.text
        assert json.loads(reply.json()["error"])["code"] == "bad_image"
        assert time.monotonic() - began_s < 2


class TestOwners:
    """A job belongs to the key that asked for it; for all others it is not there."""

    def test_another_s_job_is_not_there(self, locked_server: Running) -> None:
        text, _ = locked_server.keys.add("stranger", Limits())
        with locked_server.client(KEY) as owner, locked_server.client(text) as other:
            job = owner.post("/v1/videos", json={"prompt": "x", **TINY}).json()["id"]
            locked_server.finish()
            for method, path in (
                ("GET", f"/v1/videos/{job}"),
                ("GET", f"/v1/videos/{job}/content"),
                ("DELETE", f"/v1/videos/{job}"),
                ("POST", f"/v1/videos/{job}/remix"),
                ("GET", f"/v1/jobs/{job}"),
                ("GET", f"/v1/jobs/{job}/events"),
                ("POST", f"/v1/jobs/{job}/cancel"),
                ("DELETE", f"/v1/jobs/{job}"),
                ("GET", f"/status/{job}"),
                ("GET", f"/stream/{job}"),
                ("POST", f"/cancel/{job}"),
                ("POST", f"/retry/{job}"),
                ("GET", f"/status/ask-{job}"),
            ):
                content = b'{"prompt": "y"}' if method == "POST" else None
                reply = other.request(method, path, content=content)
                assert reply.status_code == 404, (method, path)
                missing = path.replace(job, "video_" + "0" * 32)
                same = other.request(method, missing, content=content)
                assert same.status_code == 404
                masked = [
                    re.sub(r"video_\w+|req_\w+", "ID", answer.text) for answer in (reply, same)
                ]
                assert masked[0] == masked[1], "a stranger could tell that it exists"
            asking = {"input": {"action": "status", "params": {"request_id": job}}}
            assert other.post("/runsync", json=asking).status_code == 404
            assert other.get("/v1/videos").json()["data"] == []
            assert other.get("/v1/jobs").json()["jobs"] == []
            assert other.get("/v1/videos", params={"after": job}).status_code == 404
            assert other.get("/health").json()["jobs"]["completed"] == 0
            assert owner.get(f"/v1/videos/{job}").status_code == 200

    def test_a_stranger_s_idempotency_key_is_another_one(self, locked_server: Running) -> None:
        text, _ = locked_server.keys.add("stranger two", Limits())
        made = []
        for key in (KEY, text):
            with locked_server.client(key) as client:
                headers = {"idempotency-key": "same"}
                reply = client.post("/v1/videos", json={"prompt": "x", **TINY}, headers=headers)
                made.append(reply.json()["id"])
        assert made[0] != made[1]
        locked_server.finish()
        locked_server.finish()


class TestKeys:
    @pytest.mark.parametrize(
        "header",
        [
            None, "", "Bearer", "Bearer ", "Bearer wf_wrong", f"Basic {KEY}", f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}", f"bearer  {KEY.upper()}", "Bearer " + "x" * 50_000,
            "Bearer \xff\xfe", f"Token {KEY}",
        ],
    )  # fmt: skip
    def test_without_the_key_there_is_only_health(
        self, locked_server: Running, header: str | None
    ) -> None:
        headers = [] if header is None else [f"Authorization: {header}"]
        for target in ("/v1/jobs", "/health", "/metrics", "/v1/models", "/nowhere", "/v1/files"):
            answer = talk(locked_server.port, request_of(target, *headers))
            assert status_of(answer) == 401, (target, answer[:100])
        for target in ("/livez", "/readyz", "/openapi.json"):
            assert status_of(talk(locked_server.port, request_of(target))) != 401

    @pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", KEY])
    def test_the_key_as_clients_send_it(self, locked_server: Running, header: str) -> None:
        """RunPod's own worker sends it without a word before it."""
        answer = talk(locked_server.port, request_of("/v1/jobs", f"Authorization: {header}"))
        assert status_of(answer) == 200

    def test_a_key_is_checked_in_constant_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By construction: whatever is sent, one hash of it is made, and that is compared with
        every live key's by compare_digest, none of which stops the others."""
        file = KeyFile(tmp_path / "keys.json")
        texts = [file.add(f"key {i}", Limits())[0] for i in range(5)]
        ring = Keyring(file, KEY, Limits())
        compared: list[tuple[int, int]] = []
        compare = hmac.compare_digest

        def watched(a: str, b: str) -> bool:
            compared.append((len(a), len(b)))
            return compare(a, b)

        monkeypatch.setattr("wanfit.serve.keys.hmac.compare_digest", watched)
        for sent in (texts[0], texts[-1], KEY, "", "x", "x" * 10_000, texts[2][:-1]):
            compared.clear()
            found = ring.find(sent)
            assert (found is not None) == (sent in {*texts, KEY})
            assert compared == [(64, 64)] * 6

    def test_keys_are_kept_as_hashes_that_only_the_owner_reads(self, tmp_path: Path) -> None:
        file = KeyFile(tmp_path / "keys.json")
        text, key = file.add("me", Limits())
        kept = file.path.read_text()
        assert text not in kept
        assert text.removeprefix("wf_") not in kept
        assert len(text) >= 3 + 128 / 6
        assert key.sha256 in kept
        assert file.path.stat().st_mode & 0o077 == 0

    def test_a_revoked_key_is_refused_at_once_and_the_server_stays_closed(
        self, tmp_path: Path
    ) -> None:
        """The first key closes an open server; revoking the last does not open it again."""
        with running(tmp_path) as server, server.client() as stranger:
            assert stranger.get("/v1/jobs").status_code == 200
            text, key = server.keys.add("first", Limits())
            assert stranger.get("/v1/jobs").status_code == 401
            with server.client(text) as owner:
                assert owner.get("/v1/jobs").status_code == 200
                server.keys.revoke(key.id)
                assert owner.get("/v1/jobs").status_code == 401
            assert stranger.get("/v1/jobs").status_code == 401

    def test_while_the_file_of_keys_is_broken_nobody_gets_in(self, tmp_path: Path) -> None:
        with running(tmp_path) as server:
            text, _ = server.keys.add("first", Limits())
            with server.client(text) as client:
                assert client.get("/v1/jobs").status_code == 200
                good = server.keys.path.read_bytes()
                server.keys.path.write_bytes(b"{")
                reply = client.get("/v1/jobs")
                assert reply.status_code == 503
                assert str(tmp_path) not in reply.text
                server.keys.path.write_bytes(good)
                assert client.get("/v1/jobs").status_code == 200

    def test_limits_of_a_key(self, tmp_path: Path) -> None:
        """Rate of requests, rate of jobs, length of the queue, size of a job."""
        with running(tmp_path, api_key=KEY) as server:
            slow, _ = server.keys.add("slow", Limits(requests_per_s=0.1))
            with server.client(slow) as client:
                assert client.get("/v1/jobs").status_code == 200
                reply = client.get("/v1/jobs")
                assert reply.status_code == 429
                assert int(reply.headers["retry-after"]) >= 1
            few, _ = server.keys.add("few", Limits(max_queued=2))
            with server.client(few) as client:
                codes = [
                    client.post("/v1/jobs", json={"prompt": "x", **TINY}).status_code
                    for _ in range(3)
                ]
                assert codes == [202, 202, 429]
            rare, _ = server.keys.add("rare", Limits(jobs_per_minute=6))
            with server.client(rare) as client:
                codes = [
                    client.post("/v1/jobs", json={"prompt": "x", **TINY}).status_code
                    for _ in range(2)
                ]
                assert codes == [202, 429]
                assert client.get("/v1/jobs").status_code == 200
            small, _ = server.keys.add("small", Limits(max_work=64 * 64 * 5 * 2))
            with server.client(small) as client:
                ok = client.post("/v1/jobs", json={"prompt": "x", **TINY})
                assert ok.status_code == 202
                more = {**TINY, "num_inference_steps": 3}
                reply = client.post("/v1/jobs", json={"prompt": "x", **more})
                assert reply.status_code == 403
                assert reply.json()["error"]["code"] == "over_limit"
            with server.client(KEY) as client:
                assert client.get("/v1/jobs").status_code == 200, "one key's limit is its own"
