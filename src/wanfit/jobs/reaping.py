"""What time ends: leases whose holder went silent, and jobs that waited past their deadline.

Each is judged by seconds that this process saw go by (`leases.py`), or by a process of this machine
that is gone (`liveness.py`).
"""

from __future__ import annotations

import math

import sqlalchemy as sa

from wanfit.jobs.attempts import lose
from wanfit.jobs.database import Transaction
from wanfit.jobs.job import Failure
from wanfit.jobs.leases import Stillness
from wanfit.jobs.rows import Row, finish
from wanfit.jobs.schema import jobs

SILENT = Failure("worker_killed", "Its worker was silent for as long as a lease lasts")
GONE = Failure("worker_killed", "The process that ran it is gone")


def silent_leases(connection: sa.Connection, watch: Stillness, lease_s: float) -> list[str]:
    """The leases of running jobs without a heartbeat for `lease_s`."""
    query = sa.select(jobs.c.lease, jobs.c.beats).where(jobs.c.state == "running")
    leases = connection.execute(query).all()
    watch.forget_others(lease for lease, _ in leases)
    return [lease for lease, beats in leases if watch.is_over(lease, beats, lease_s)]


def passed_deadlines(connection: sa.Connection, watch: Stillness, now_s: float) -> list[str]:
    """The waiting jobs whose deadline has passed.

    Running ones are watched too: one that comes back into the queue has been seen before a jump.
    """
    query = sa.select(jobs.c.id, jobs.c.deadline_s, jobs.c.state).where(
        jobs.c.state.in_(("queued", "running")), jobs.c.deadline_s.is_not(None)
    )
    watched = connection.execute(query).all()
    watch.forget_others(job_id for job_id, _, _ in watched)
    return [
        job_id
        for job_id, deadline_s, state in watched
        if watch.is_over(job_id, deadline_s, left_s(deadline_s, now_s)) and state == "queued"
    ]


def left_s(deadline_s: float, now_s: float) -> float:
    return deadline_s - now_s if math.isfinite(deadline_s) else math.inf


def end_leases(tx: Transaction, leases: list[str], failure: Failure) -> list[Row]:
    """Takes running jobs from their workers, those that still hold these leases."""
    query = sa.select(jobs).where(jobs.c.lease.in_(leases), jobs.c.state == "running")
    rows = tx.execute(query).mappings().all()
    return [lose(tx, row, failure, blame=False, by=None) for row in rows]


def end_waiting(tx: Transaction, job_ids: list[str]) -> list[Row]:
    query = sa.select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.state == "queued")
    rows = tx.execute(query).mappings().all()
    return [finish(tx, row, "expired", by=None) for row in rows]
