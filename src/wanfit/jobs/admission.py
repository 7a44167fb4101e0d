"""Into the queue: each job once, however often it is sent.

A client that lost our reply sends its request again. It is the same job by, in this order: the id
that its face brought; the owner's idempotency key; the same body within a window, where the face
saw that it is a retry. Left out: whether the request is a good one, which was settled before.
"""

from __future__ import annotations

import hashlib

import sqlalchemy as sa

from wanfit.errors import KeyReused, QueueFull
from wanfit.jobs.database import Transaction
from wanfit.jobs.job import NewJob, QueueLimit, check_id, new_id
from wanfit.jobs.rows import Row, add_event, finish
from wanfit.jobs.schema import inputs, jobs

_visible = jobs.c.deleted.is_(False)


def submit(tx: Transaction, new: NewJob, limit: QueueLimit) -> tuple[Row, bool]:
    """The job's row, and whether it is new. Raises KeyReused, QueueFull, BadOption."""
    earlier = _same_id(tx, new) or _same_key(tx, new) or _same_body(tx, new)
    if earlier is not None:
        return earlier, False
    source = _cached(tx, new)
    if source is None:
        _check_limit(tx, new.owner, limit)
    row = _insert(tx, new)
    add_event(tx, row, "queued")
    if source is not None:
        row = finish(
            tx,
            row,
            "completed",
            by=None,
            percent=100.0,
            result=source["result"],
            result_key=source["result_key"],
            report=source["report"],
            started_s=tx.now_s,
            cached=True,
        )
    return row, True


def _same_id(tx: Transaction, new: NewJob) -> Row | None:
    if new.id is None:
        return None
    row = _newest(tx, jobs.c.id == check_id(new.id))
    if row is None:
        return None
    if row["owner"] != new.owner or row["deleted"]:
        raise KeyReused(f"The id {new.id!r} is taken", hint="Use another id")
    return _unless_other_body(row, new, f"The id {new.id!r}")


def _same_key(tx: Transaction, new: NewJob) -> Row | None:
    if new.idempotency_key is None:
        return None
    hashed = jobs.c.key_hash == _hash(new.idempotency_key)
    row = _newest(tx, jobs.c.owner == new.owner, hashed, _visible)
    return None if row is None else _unless_other_body(row, new, "This idempotency key")


def _same_body(tx: Transaction, new: NewJob) -> Row | None:
    """Of a retry without a key. Two equal requests that are no retries are two jobs."""
    if new.dedupe_s is None or new.body_hash is None or new.idempotency_key is not None:
        return None
    row = _newest(tx, jobs.c.owner == new.owner, jobs.c.body_hash == new.body_hash, _visible)
    # A clock that jumped back makes the age negative: then it is a retry, not a job of tomorrow.
    return row if row is not None and tx.now_s - row["created_s"] <= new.dedupe_s else None


def _unless_other_body(row: Row, new: NewJob, what: str) -> Row:
    if new.body_hash is not None and row["body_hash"] not in (None, new.body_hash):
        raise KeyReused(
            f"{what} came before with another request, as job {row['id']}",
            hint="Use a new one for a new request",
        )
    return row


def _cached(tx: Transaction, new: NewJob) -> Row | None:
    """The owner's finished job that answers this one; the cache is on where a key is given."""
    if new.cache_key is None:
        return None
    return _newest(
        tx,
        jobs.c.owner == new.owner,
        jobs.c.cache_key == new.cache_key,
        jobs.c.state == "completed",
        jobs.c.output_gone.is_(False),
        _visible,
    )


def _newest(tx: Transaction, *conditions: sa.ColumnElement[bool]) -> Row | None:
    query = sa.select(jobs).where(*conditions).order_by(jobs.c.seq.desc()).limit(1)
    return tx.execute(query).mappings().first()


def _check_limit(tx: Transaction, owner: str, limit: QueueLimit) -> None:
    waiting = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == "queued")
    for most, query, whose in (
        (limit.queued, waiting, ""),
        (limit.queued_by_owner, waiting.where(jobs.c.owner == owner), " of this key"),
    ):
        if most is not None and (count := tx.connection.scalar(query) or 0) >= most:
            raise QueueFull(
                f"{count} jobs{whose} wait, and {most} may", hint="Try again when some are done"
            )


def _insert(tx: Transaction, new: NewJob) -> Row:
    values = {
        "id": new.id or new_id(),
        "face": new.face,
        "owner": new.owner,
        "request": dict(new.request),
        "has_image": new.image is not None,
        "plan": dict(new.plan),
        "extra": dict(new.extra),
        "webhook": new.webhook,
        "expected_s": new.expected_s,
        "timeout_s": new.timeout_s,
        "deadline_s": new.deadline_s,
        "key_hash": None if new.idempotency_key is None else _hash(new.idempotency_key),
        "body_hash": new.body_hash,
        "cache_key": new.cache_key,
        "state": "queued",
        "priority": new.priority,
        "created_s": tx.now_s,
    }
    row = tx.execute(sa.insert(jobs).values(values).returning(jobs)).mappings().one()
    if new.image is not None:
        tx.execute(sa.insert(inputs).values(job_id=row["id"], png=new.image))
    return row


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
