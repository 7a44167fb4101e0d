"""Notices reach a real receiver, which checks them with the published library."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tests.fetch.servers import Server, redirect, reply, serving
from wanfit.errors import BadSetting
from wanfit.fetch import Guard
from wanfit.jobs.job import Failure, NewJob, Notice
from wanfit.jobs.store import JobStore
from wanfit.webhooks import WAITS_S, Secret, Sender, sign, wait_s

KEY = Secret.draw()


def notice(url: str, attempts: int = 1) -> Notice:
    return Notice("msg_1", "job-1", "completed", url, time.time(), attempts)


def word(of: Notice) -> dict[str, Any]:
    return {"type": f"video.{of.state}", "data": {"id": of.job_id, "prompt": "füchse"}}


class MemoryOutbox:
    """An outbox that notes what was reported to it."""

    def __init__(self, *due: Notice) -> None:
        self.due = list(due)
        self.sent: list[Notice] = []
        self.failed: list[tuple[str, float | None]] = []

    def due_notices(self, limit: int = 20, hold_s: float = 120.0) -> list[Notice]:
        taken, self.due = self.due[:limit], self.due[limit:]
        return taken

    def notice_sent(self, notice: Notice) -> None:
        self.sent.append(notice)

    def notice_failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None:
        self.failed.append((why, retry_in_s))


def send(outbox: MemoryOutbox, port: int, *keys: Secret) -> None:
    Sender(outbox, Guard({("127.0.0.1", port)}), keys or (KEY,), word).send_due()


def received(server: Server) -> tuple[dict[str, str], bytes]:
    """Headers and body of the only request."""
    (request,) = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines), body


class TestSigning:
    def test_the_published_library_verifies_what_arrives(self) -> None:
        with serving(lambda connection, path: reply(connection, b"", "204 No Content")) as server:
            outbox = MemoryOutbox(notice(f"{server.origin}/hook?a=b"))
            send(outbox, server.port)
        headers, body = received(server)
        assert Webhook(KEY.text).verify(body, headers) == word(notice(""))
        assert headers["webhook-id"] == "msg_1"
        assert headers["Content-Type"] == "application/json"
        assert len(outbox.sent) == 1
        for changed in (body + b" ", body.replace(b"completed", b"failed")):
            with pytest.raises(WebhookVerificationError):
                Webhook(KEY.text).verify(changed, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(KEY.text).verify(body, {**headers, "webhook-id": "msg_2"})

    def test_while_keys_change_receivers_with_either_verify_it(self) -> None:
        new = Secret.draw()
        with serving(lambda connection, path: reply(connection)) as server:
            send(MemoryOutbox(notice(server.origin)), server.port, new, KEY)
        headers, body = received(server)
        for key in (new, KEY):
            Webhook(key.text).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(Secret.draw().text).verify(body, headers)

    def test_signs_as_the_library_does(self) -> None:
        moment = datetime(2026, 1, 2, tzinfo=UTC)
        ours = sign(KEY, "msg", int(moment.timestamp()), b"{}")
        assert ours == Webhook(KEY.text).sign("msg", moment, "{}")

    def test_what_is_held_back_for_long_is_signed_with_the_time_of_its_sending(self) -> None:
        old = replace(notice(""), created_s=time.time() - 86400)
        with serving(lambda connection, path: reply(connection)) as server:
            send(MemoryOutbox(replace(old, url=server.origin)), server.port)
        headers, body = received(server)
        Webhook(KEY.text).verify(body, headers)  # which allows five minutes
        assert abs(time.time() - int(headers["webhook-timestamp"])) < 10

    @pytest.mark.parametrize("text", ["", "whsec_", "whsec_!!", "hunter2", "whsec_" + "QUJD" * 7])
    def test_a_secret_that_is_none_is_refused_unrepeated(self, text: str) -> None:
        with pytest.raises(BadSetting, match="24 to 64 bytes") as raised:
            Secret.parse(text)
        assert text in ("", "whsec_") or text not in str(raised.value)

    def test_a_secret_stays_out_of_what_is_printed(self) -> None:
        assert Secret.parse(KEY.text) == KEY
        assert base64.b64encode(KEY.key).decode() not in repr(KEY)
        assert str(KEY.key) not in repr(KEY)


class TestRetrying:
    @pytest.mark.parametrize("status", ["301 Moved", "400 Bad", "404 Not", "429 Too", "500 Oops"])
    def test_another_answer_is_tried_again_later(self, status: str) -> None:
        with serving(lambda connection, path: reply(connection, b"", status)) as server:
            outbox = MemoryOutbox(notice(server.origin))
            send(outbox, server.port)
        ((why, retry_in_s),) = outbox.failed
        assert status[:3] in why
        assert retry_in_s is not None
        assert WAITS_S[0] <= retry_in_s <= 1.2 * WAITS_S[0]
        assert not outbox.sent

    def test_a_redirect_is_not_followed_into_the_inside(self) -> None:
        with (
            serving(lambda connection, path: reply(connection)) as secret,
            serving(
                lambda connection, path: redirect(connection, secret.origin, "307 T")
            ) as server,
        ):
            outbox = MemoryOutbox(notice(server.origin))
            send(outbox, server.port)
        assert outbox.failed
        assert secret.requests == []

    def test_an_address_of_the_inside_is_given_up_unasked(self) -> None:
        with serving(lambda connection, path: reply(connection)) as server:
            outbox = MemoryOutbox(notice(f"http://localhost:{server.port}/"))
            Sender(outbox, Guard(ports={server.port}), (KEY,), word).send_due()
        ((why, retry_in_s),) = outbox.failed
        assert "not a public address" in why
        assert retry_in_s is None
        assert server.requests == []

    def test_a_receiver_that_wants_no_more_is_left_alone(self) -> None:
        with serving(lambda connection, path: reply(connection, b"", "410 Gone")) as server:
            outbox = MemoryOutbox(notice(server.origin))
            send(outbox, server.port)
        assert outbox.failed == [("answered 410", None)]

    def test_nobody_there_is_tried_again(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        outbox = MemoryOutbox(notice(f"http://127.0.0.1:{port}/"))
        send(outbox, port)
        assert outbox.failed[0][1] is not None

    def test_waits_grow_and_end_after_three_days(self) -> None:
        waits = [wait_s(attempts) for attempts in range(1, len(WAITS_S) + 2)]
        *given, last = waits
        assert last is None
        assert all(wait is not None for wait in given)
        assert sorted(WAITS_S) == list(WAITS_S)
        assert 3 * 86400 < sum(WAITS_S) < 4 * 86400

    @pytest.mark.parametrize(
        ("asked", "least_s"),
        [
            ("120", 120),
            ("1", 5),
            ("99999999", 86400),
            ("Wed, 21 Oct 2026 07:28:00 GMT", 5),
            ("²", 5),
        ],
    )
    def test_a_receiver_may_ask_for_more_time(self, asked: str, least_s: float) -> None:
        wait = wait_s(1, asked)
        assert wait is not None
        assert least_s <= wait <= max(least_s, 6)

    def test_a_slow_receiver_does_not_hold_up_the_others(self) -> None:
        release = threading.Event()

        def behave(connection: socket.socket, path: bytes) -> None:
            if path == b"/slow":
                release.wait(5)
            reply(connection)

        with serving(behave) as server:
            names = ["slow", *"abcdef"]
            outbox = MemoryOutbox(*(notice(f"{server.origin}/{name}") for name in names))
            thread = threading.Thread(target=send, args=(outbox, server.port))
            thread.start()
            until_s = time.monotonic() + 4
            while len(outbox.sent) < 6 and time.monotonic() < until_s:
                time.sleep(0.01)
            assert len(outbox.sent) == 6
            release.set()
            thread.join()
        assert len(outbox.sent) == 7


class TestWithTheJobStore:
    def test_a_failed_try_is_repeated_with_the_same_id_until_it_arrives(
        self, tmp_path: Path
    ) -> None:
        """From the end of a job to the receiver: refused once, then taken, then never again."""
        answers = iter(["500 Oops", "200 OK"])
        arrived = threading.Event()

        def behave(connection: socket.socket, path: bytes) -> None:
            status = next(answers)
            reply(connection, b"", status)
            if status == "200 OK":
                arrived.set()

        class Impatient:
            """The store, told to wait a tenth of a second."""

            def due_notices(self, limit: int = 20, hold_s: float = 120.0) -> list[Notice]:
                return store.due_notices(limit, hold_s)

            def notice_sent(self, notice: Notice) -> None:
                store.notice_sent(notice)

            def notice_failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None:
                assert retry_in_s is not None
                store.notice_failed(notice, why, retry_in_s / 50)

        store = JobStore(str(tmp_path / "jobs.db"))
        stopped = threading.Event()
        try:
            with serving(behave) as server:
                new = NewJob("own", "", {"prompt": "x"}, webhook=f"{server.origin}/hook")
                job, _ = store.submit(new)
                claim = store.claim("worker")
                assert claim is not None
                store.fail(claim, Failure("internal_error", "x"))
                sender = Sender(Impatient(), Guard({("127.0.0.1", server.port)}), (KEY,), word)
                thread = threading.Thread(target=sender.run, args=(stopped, 0.05))
                thread.start()
                assert arrived.wait(10)
                time.sleep(0.3)
                stopped.set()
                thread.join()
            assert store.due_notices() == []
        finally:
            stopped.set()
            store.close()
        assert len(server.requests) == 2
        ids = [
            request.lower().split(b"webhook-id: ")[1].split(b"\r\n")[0]
            for request in server.requests
        ]
        assert ids[0] == ids[1]
        body: Mapping[str, Any] = json.loads(server.requests[1].partition(b"\r\n\r\n")[2])
        assert body["type"] == "video.failed"
        assert body["data"]["id"] == job.id
