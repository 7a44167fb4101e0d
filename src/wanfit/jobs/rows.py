"""Rows of the job table: found, read into a Job, and changed with an event beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from wanfit.errors import NoSuchJob
from wanfit.jobs.database import Transaction
from wanfit.jobs.job import Claim, EventKind, Failure, Job, State
from wanfit.jobs.schema import events, inputs, jobs, notices
from wanfit.outputs import Kept

Row = sa.RowMapping
_AS_THEY_ARE = tuple(name for name in Job.__slots__ if name not in ("error", "result"))


def job_of(row: Row) -> Job:
    """The job that a row holds."""
    error, result = row["error"], row["result"]
    return Job(
        **{name: row[name] for name in _AS_THEY_ARE},
        error=None if error is None else Failure(**error),
        result=None if result is None else Kept.from_json(result),
    )


def find(connection: sa.Connection, job_id: str, owner: str | None) -> Row:
    """The row of a job that this owner may see. Raises NoSuchJob."""
    query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.deleted.is_(False))
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise no_such_job(job_id)
    return row


def no_such_job(job_id: str) -> NoSuchJob:
    return NoSuchJob(f"There is no job {job_id[:100]!r}")


def change(tx: Transaction, job_id: str, **values: Any) -> Row:
    """Writes values of a job, and gives the row as it is then."""
    statement = sa.update(jobs).where(jobs.c.id == job_id).values(**values).returning(jobs)
    tx.changed.append(job_id)
    return tx.execute(statement).mappings().one()


def add_event(
    tx: Transaction, row: Row, kind: EventKind, data: Mapping[str, Any] | None = None
) -> None:
    """One event of a job, with the percent of its row. The count is raised in the row first, which
    locks it: progress comes in transactions of its own."""
    seq = change(tx, row["id"], last_event=jobs.c.last_event + 1)["last_event"]
    tx.execute(
        sa.insert(events).values(
            job_id=row["id"],
            seq=seq,
            at_s=tx.now_s,
            kind=kind,
            percent=row["percent"],
            data=data or {},
        )
    )


def requeue(tx: Transaction, row: Row, why: str, *, by: Claim | None, **values: Any) -> Row:
    """Back at its old place in the queue. by: the claim that gives it back itself."""
    row = change(
        tx,
        row["id"],
        state="queued",
        worker=None,
        lease=None,
        closed_by=None if by is None else by.lease,
        percent=0.0,
        stage=None,
        step=None,
        steps=None,
        **values,
    )
    add_event(tx, row, "queued", {"why": why})
    return row


def finish(
    tx: Transaction,
    row: Row,
    state: State,
    *,
    by: Claim | None,
    failure: Failure | None = None,
    **values: Any,
) -> Row:
    """The one way into a final state: lease released, event written, webhook in the outbox.

    by: the claim whose word this is, which may say it again.
    """
    assert row["state"] in ("queued", "running"), f"{row['id']} is {row['state']} for ever"
    row = change(
        tx,
        row["id"],
        state=state,
        worker=None,
        lease=None,
        closed_by=None if by is None else by.lease,
        ended_s=tx.now_s,
        stage=None,
        error=None if failure is None else asdict(failure),
        **values,
    )
    add_event(tx, row, _KIND_OF[state], None if failure is None else _told(failure))
    if row["webhook"] is not None and not row["deleted"]:
        tx.execute(
            sa.insert(notices).values(
                id=f"msg_{row['id']}_{state}",  # the same for ever: who hears it twice can tell
                job_id=row["id"],
                state=state,
                url=row["webhook"],
                created_s=tx.now_s,
            )
        )
    return row


def erase(tx: Transaction, row: Row) -> None:
    """Leaves a tombstone, so that the id is not used again and a pager finds its place."""
    change(
        tx,
        row["id"],
        deleted=True,
        request={},
        has_image=False,
        plan={},
        extra={},
        webhook=None,
        report=None,
        error=None,
        result=None,
        result_key=None,
        key_hash=None,
        body_hash=None,
        cache_key=None,
    )
    tx.execute(sa.delete(inputs).where(inputs.c.job_id == row["id"]))
    tx.execute(sa.delete(events).where(events.c.job_id == row["id"]))
    tx.execute(sa.delete(notices).where(notices.c.job_id == row["id"]))


def image_of(connection: sa.Connection, job_id: str) -> bytes | None:
    png = connection.scalar(sa.select(inputs.c.png).where(inputs.c.job_id == job_id))
    return None if png is None else bytes(png)


def claim_of(row: Row) -> Claim:
    return Claim(job_of(row), row["attempts"], row["lease"], row["worker"])


def _told(failure: Failure) -> dict[str, Any]:
    return {"code": failure.code, "message": failure.message, "hint": failure.hint}


_KIND_OF: Mapping[State, EventKind] = {
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}
