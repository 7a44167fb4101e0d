"""Tells the addresses that jobs name what became of them, as Standard Webhooks has it.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md: three
headers, `webhook-id` (the same over all tries, so that a receiver can drop a repetition),
`webhook-timestamp`, and `webhook-signature`, which signs both with the body. Notices come from the
outbox of the job store, so none is lost with this process. An address is a stranger's: it goes
through `fetch.Guard` at every try, and a redirect counts as a refusal. Left out: what a notice
says, which is for the face of its job to word, and asymmetric signatures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from wanfit.errors import BadSetting, BadUrl, WanfitError
from wanfit.fetch import Answer, Guard, post
from wanfit.jobs.job import Notice

# Waits after the first, second, ... try. official: the spec's example of a schedule.
WAITS_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
SPREAD = 0.2  # ours: so that what failed together is not tried together
MOST_ASKED_WAIT_S = 86400.0  # ours: the longest that a Retry-After puts off a try
GONE = 410  # official: the receiver wants no more of it
AT_ONCE = 8  # ours: a receiver that answers slowly holds one of them for 25 s at most
POLL_S = 1.0  # ours: how late a notice may be
HOLD_S = 120.0  # ours: several times what one try can take
SECRET_PREFIX = "whsec_"
SECRET_BYTES = range(24, 65)  # official: between 24 and 64 bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that this server signs with and a receiver checks with."""

    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Secret:
        """From "whsec_" and base64. Raises BadSetting, which does not repeat it."""
        encoded = text.strip().removeprefix(SECRET_PREFIX)
        try:
            key = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) not in SECRET_BYTES:
            raise BadSetting(
                "The secret of webhooks is not 'whsec_' and 24 to 64 bytes in base64",
                hint=f"As this new one is: {cls.draw().text}",
            )
        return cls(key)

    @classmethod
    def draw(cls) -> Secret:
        """A new one."""
        return cls(secrets.token_bytes(32))

    @property
    def text(self) -> str:
        """As a receiver's library takes it."""
        return SECRET_PREFIX + base64.b64encode(self.key).decode()


def sign(secret: Secret, message_id: str, timestamp_s: int, body: bytes) -> str:
    """One signature: `v1,` and base64 of HMAC-SHA256 over id.timestamp.body."""
    signed = b".".join((message_id.encode(), str(timestamp_s).encode(), body))
    digest = hmac.new(secret.key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


class Outbox(Protocol):
    """What the job store keeps for us."""

    def due_notices(self, limit: int = 20, hold_s: float = 120.0) -> list[Notice]: ...
    def notice_sent(self, notice: Notice) -> None: ...
    def notice_failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None: ...


class Sender:
    """Takes due notices from an outbox and sends them, several at a time.

    keys: the newest first; several while receivers change from one to the next, and a notice is
    signed with each. word: what a notice says, as plain values for JSON.
    """

    def __init__(
        self,
        outbox: Outbox,
        guard: Guard,
        keys: Sequence[Secret],
        word: Callable[[Notice], Mapping[str, Any]],
    ) -> None:
        assert keys, "an unsigned notice proves nothing"
        self._outbox = outbox
        self._guard = guard
        self._keys = tuple(keys)
        self._word = word

    def run(self, stopped: threading.Event, poll_s: float = POLL_S) -> None:
        """Sends until `stopped`; what is on its way then is waited for."""
        while not stopped.is_set():
            try:
                busy = self.send_due()
            except WanfitError as error:  # the database is locked or away: it will be back
                _log.warning("notices cannot be read: %s", error)
                busy = 0
            if not busy:
                stopped.wait(poll_s)

    def send_due(self) -> int:
        """Sends what is due now, and gives how many that were."""
        due = self._outbox.due_notices(AT_ONCE, HOLD_S)
        if due:
            with ThreadPoolExecutor(min(AT_ONCE, len(due)), "webhook") as pool:
                list(pool.map(self._send, due))
        return len(due)

    def _send(self, notice: Notice) -> None:
        body = json.dumps(self._word(notice), ensure_ascii=False, separators=(",", ":")).encode()
        timestamp_s = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": notice.id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": " ".join(
                sign(key, notice.id, timestamp_s, body) for key in self._keys
            ),
        }
        try:
            answer = post(notice.url, body, headers, self._guard)
        except BadUrl as error:  # it leads inside, and no wait makes that right
            self._failed(notice, str(error), None)
        except WanfitError as error:
            self._failed(notice, str(error), wait_s(notice.attempts))
        else:
            self._judge(notice, answer)

    def _judge(self, notice: Notice, answer: Answer) -> None:
        if 200 <= answer.status < 300:
            self._outbox.notice_sent(notice)
            return
        why = f"answered {answer.status}"
        if answer.status == GONE:
            self._failed(notice, why, None)
        else:
            self._failed(notice, why, wait_s(notice.attempts, answer.retry_after))

    def _failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None:
        """An address may hold a secret of its owner, so logs have the job only."""
        later = "given up" if retry_in_s is None else f"again in {retry_in_s:.0f} s"
        _log.warning("webhook of job %s: %s; %s", notice.job_id, why, later)
        self._outbox.notice_failed(notice, why, retry_in_s)


def wait_s(attempts: int, retry_after: str | None = None) -> float | None:
    """Seconds until the next try after so many; None when that was the last.

    Not before the receiver asks for, where it says so in seconds.
    """
    if attempts > len(WAITS_S):
        return None
    ours_s = WAITS_S[attempts - 1] * random.uniform(1, 1 + SPREAD)
    asked = (retry_after or "").strip()
    asked_s = float(asked) if asked.isascii() and asked.isdigit() else 0.0
    return max(ours_s, min(asked_s, MOST_ASKED_WAIT_S))
