"""An attempt at a job: claimed, kept alive, ended once; and what happens when its worker is lost.

Fencing: a claim has a lease that was drawn for it. Every write of an attempt says it again, and is
refused when the job is somebody else's by then, or over. A write that was made but whose answer was
lost (a database that went away in its commit) may be made again by the same claim.

Who is lost how often: an attempt may end with no word from its worker MAX_LOSSES times, for
whatever reason (the server was killed, the machine lost power, somebody killed the GPU process).
When the worker died of the job itself, as far as we can tell (`endings.py`), MAX_DEATHS is enough:
a third try would only take the next worker down. A drained job comes back without any of that.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from wanfit.errors import StaleLease
from wanfit.jobs.database import Transaction
from wanfit.jobs.job import Claim, EventKind, Failure, Progress
from wanfit.jobs.rows import Row, add_event, change, finish, requeue
from wanfit.jobs.schema import events, jobs
from wanfit.outputs import Kept

MAX_DEATHS = 2  # of the issue: a job that kills its worker twice is failed
MAX_LOSSES = 5  # ours: bad luck more often than that is no luck


def claim_next(tx: Transaction, worker: str) -> Row | None:
    """The row of the job that is `worker`'s from now on: highest priority, then oldest."""
    waiting = (
        sa.select(jobs.c.id)
        .where(jobs.c.state == "queued")
        .order_by(jobs.c.priority.desc(), jobs.c.seq)
        .limit(1)
    )
    job_id = tx.connection.scalar(waiting)
    if job_id is None:
        return None
    row = change(
        tx,
        job_id,
        state="running",
        worker=worker,
        lease=secrets.token_hex(8),
        attempts=jobs.c.attempts + 1,
        beats=0,
        started_s=tx.now_s,
        percent=0.0,
    )
    add_event(tx, row, "started", {"attempt": row["attempts"]})
    return row


def beat(
    tx: Transaction,
    claim: Claim,
    progress: Progress | None,
    news: Sequence[tuple[EventKind, Mapping[str, Any]]],
) -> bool:
    """One heartbeat, with what happened since the last. Whether the job is to be cancelled."""
    values: dict[str, Any] = {
        "beats": jobs.c.beats + 1,
        "last_event": jobs.c.last_event + len(news),
    }
    if progress is not None:
        values |= {
            "percent": progress.percent,
            "stage": progress.stage,
            "step": progress.step,
            "steps": progress.steps,
        }
    statement = (
        sa.update(jobs)
        .where(jobs.c.id == claim.job.id, jobs.c.lease == claim.lease, jobs.c.state == "running")
        .values(**values)
        .returning(jobs.c.cancel_requested, jobs.c.last_event, jobs.c.percent)
    )
    row = tx.execute(statement).mappings().first()
    if row is None:
        raise _stale(claim)
    if progress is not None or news:
        tx.changed.append(claim.job.id)
    _add_news(tx, claim.job.id, row, news)
    return bool(row["cancel_requested"])


def _add_news(
    tx: Transaction, job_id: str, row: Row, news: Sequence[tuple[EventKind, Mapping[str, Any]]]
) -> None:
    if not news:
        return
    if any(kind == "preview" for kind, _ in news):  # kilobytes each, and only the newest is of use
        old = sa.delete(events).where(events.c.job_id == job_id, events.c.kind == "preview")
        tx.execute(old)
    first = row["last_event"] - len(news) + 1
    rows = [
        {
            "job_id": job_id,
            "seq": seq,
            "at_s": tx.now_s,
            "kind": kind,
            "percent": row["percent"],
            "data": dict(data),
        }
        for seq, (kind, data) in enumerate(news, start=first)
    ]
    tx.connection.execute(sa.insert(events), rows)


def complete(tx: Transaction, claim: Claim, result: Kept, report: Mapping[str, Any]) -> Row:
    row, is_open = _held(tx, claim)
    if not is_open:
        return row
    if row["cancel_requested"]:  # somebody was told that it is cancelled, so it is
        return finish(tx, row, "cancelled", by=claim)
    return finish(
        tx,
        row,
        "completed",
        by=claim,
        percent=100.0,
        result=result.to_json(),
        result_key=result.key,
        report=dict(report),
    )


def fail(tx: Transaction, claim: Claim, failure: Failure) -> Row:
    row, is_open = _held(tx, claim)
    return finish(tx, row, "failed", by=claim, failure=failure) if is_open else row


def cancelled(tx: Transaction, claim: Claim) -> Row:
    row, is_open = _held(tx, claim)
    return finish(tx, row, "cancelled", by=claim) if is_open else row


def give_back(tx: Transaction, claim: Claim, why: str) -> Row:
    row, is_open = _held(tx, claim)
    if not is_open:
        return row
    if row["cancel_requested"]:
        return finish(tx, row, "cancelled", by=claim)
    return requeue(tx, row, why, by=claim)


def crashed(tx: Transaction, claim: Claim, failure: Failure, *, blame: bool) -> Row:
    row, is_open = _held(tx, claim)
    return lose(tx, row, failure, blame=blame, by=claim) if is_open else row


def lose(tx: Transaction, row: Row, failure: Failure, *, blame: bool, by: Claim | None) -> Row:
    """A running job has no worker any more. by: the claim that says so; None: it was found."""
    if row["cancel_requested"]:
        return finish(tx, row, "cancelled", by=by)
    losses, deaths = row["losses"] + 1, row["deaths"] + blame
    counted = {"losses": losses, "deaths": deaths}
    if deaths >= MAX_DEATHS:
        told = replace(
            failure,
            message=f"The job ended its worker {deaths} times; the last time: {failure.message}",
            plan=row["plan"],
        )
        return finish(tx, row, "failed", by=by, failure=told, **counted)
    if losses >= MAX_LOSSES:
        told = Failure(
            "attempts_exhausted",
            f"{losses} attempts were lost, and {MAX_LOSSES} may be; the last one:"
            f" {failure.message}",
            failure.hint,
            plan=row["plan"],
        )
        return finish(tx, row, "failed", by=by, failure=told, **counted)
    return requeue(tx, row, failure.message, by=by, **counted)


def _held(tx: Transaction, claim: Claim) -> tuple[Row, bool]:
    """The job's row, and whether this claim holds it; not, when it made this very write before.

    Raises StaleLease when it is somebody else's, or over.
    """
    query = sa.select(jobs).where(jobs.c.id == claim.job.id)
    row = tx.execute(query).mappings().first()
    if row is None or row["deleted"]:
        raise _stale(claim)
    if row["state"] == "running" and row["lease"] == claim.lease:
        assert row["attempts"] == claim.attempt
        return row, True
    if row["closed_by"] == claim.lease and row["attempts"] == claim.attempt:
        return row, False
    raise _stale(claim)


def _stale(claim: Claim) -> StaleLease:
    return StaleLease(
        f"Attempt {claim.attempt} of job {claim.job.id} is not the newest any more, or it is over"
    )
