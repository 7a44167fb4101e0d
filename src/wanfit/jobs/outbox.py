"""Notices that webhooks must hear: written in the transaction that ends a job, sent after it.

At least once: who takes a notice holds it back from others for a while, and if he dies, it comes
again, with the same id. Waits are counted by the monotonic clock (`leases.py`), so a jump of the
wall clock neither floods a receiver nor makes it wait for a day. Left out: the sending.
"""

from __future__ import annotations

import sqlalchemy as sa

from wanfit.jobs.database import Transaction
from wanfit.jobs.job import Notice
from wanfit.jobs.leases import Stillness
from wanfit.jobs.schema import notices

_open = sa.and_(notices.c.sent_s.is_(None), notices.c.given_up.is_(False))


def ripe(connection: sa.Connection, watch: Stillness, limit: int) -> list[tuple[str, int]]:
    """(id, attempts) of notices whose wait is over."""
    query = (
        sa.select(notices.c.id, notices.c.attempts, notices.c.wait_s)
        .where(_open)
        .order_by(notices.c.created_s, notices.c.id)
    )
    rows = connection.execute(query).all()
    watch.forget_others(row.id for row in rows)
    due = (
        (row.id, row.attempts)
        for row in rows
        if watch.is_over(row.id, (row.attempts, row.wait_s), row.wait_s)
    )
    return [found for found, _ in zip(due, range(limit), strict=False)]


def take(tx: Transaction, found: list[tuple[str, int]], hold_s: float) -> list[Notice]:
    """Those of them that nobody else took meanwhile, counted as tried once more."""
    taken = []
    for notice_id, attempts in found:
        statement = (
            sa.update(notices)
            .where(notices.c.id == notice_id, notices.c.attempts == attempts, _open)
            .values(attempts=attempts + 1, wait_s=hold_s)
            .returning(notices)
        )
        row = tx.execute(statement).mappings().first()
        if row is not None:
            names = ("id", "job_id", "state", "url", "created_s", "attempts")
            taken.append(Notice(**{name: row[name] for name in names}))
    return taken


def sent(tx: Transaction, notice: Notice) -> None:
    tx.execute(sa.update(notices).where(notices.c.id == notice.id).values(sent_s=tx.now_s))


def failed(tx: Transaction, notice: Notice, why: str, retry_in_s: float | None) -> None:
    """None: given up. Another wait begins anew, so `ripe` counts it from its first sight of it."""
    values = {"given_up": True} if retry_in_s is None else {"wait_s": retry_in_s}
    statement = (
        sa.update(notices)
        .where(notices.c.id == notice.id, notices.c.attempts == notice.attempts)
        .values(last_error=why, **values)
    )
    tx.execute(statement)
