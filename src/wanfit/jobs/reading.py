"""What is known of jobs: pages, events, counts, and where a job stands in the queue."""

from __future__ import annotations

import statistics

import sqlalchemy as sa

from wanfit.jobs.job import STATES, Job, JobEvent, Order, Outlook, Page, State
from wanfit.jobs.rows import job_of, no_such_job
from wanfit.jobs.schema import events, jobs

PACE_JOBS = 15  # ours: the newest finished ones, whose median an odd one does not move
PACE_RANGE = (0.1, 20.0)  # ours: beyond it a clock jumped, or a worker stood still
_visible = jobs.c.deleted.is_(False)


def page(
    connection: sa.Connection,
    owner: str | None,
    *,
    after: str | None,
    limit: int,
    order: Order,
    face: str | None,
) -> Page:
    """By the number of acceptance, so that a job accepted meanwhile moves no page."""
    query = sa.select(jobs).where(_visible)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if face is not None:
        query = query.where(jobs.c.face == face)
    if after is not None:
        seq = _seq(connection, after, owner)  # a deleted one still marks the place
        query = query.where(jobs.c.seq < seq if order == "desc" else jobs.c.seq > seq)
    query = query.order_by(jobs.c.seq.desc() if order == "desc" else jobs.c.seq)
    rows = connection.execute(query.limit(limit + 1)).mappings().all()
    return Page(tuple(job_of(row) for row in rows[:limit]), len(rows) > limit)


def _seq(connection: sa.Connection, job_id: str, owner: str | None) -> int:
    query = sa.select(jobs.c.seq).where(jobs.c.id == job_id)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    seq = connection.scalar(query)
    if seq is None:
        raise no_such_job(job_id)
    return int(seq)


def events_after(connection: sa.Connection, job_id: str, after: int, limit: int) -> list[JobEvent]:
    query = (
        sa.select(events)
        .where(events.c.job_id == job_id, events.c.seq > after)
        .order_by(events.c.seq)
        .limit(limit)
    )
    return [JobEvent(**row) for row in connection.execute(query).mappings()]


def counts(connection: sa.Connection, owner: str | None) -> dict[State, int]:
    query = sa.select(jobs.c.state, sa.func.count()).where(_visible).group_by(jobs.c.state)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    found = {state: count for state, count in connection.execute(query)}
    return {state: found.get(state, 0) for state in STATES}


def queued(connection: sa.Connection, owner: str | None) -> list[Job]:
    """The newest first, which is claimed last."""
    query = sa.select(jobs).where(_visible, jobs.c.state == "queued").order_by(jobs.c.seq.desc())
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    return [job_of(row) for row in connection.execute(query).mappings()]


def waiting_s(connection: sa.Connection) -> float:
    """Seconds by the plans of all that waits."""
    query = sa.select(sa.func.sum(jobs.c.expected_s)).where(jobs.c.state == "queued")
    return float(connection.scalar(query) or 0.0)


def outlook(
    connection: sa.Connection, job: Job, *, workers: int, pace: float, now_s: float
) -> Outlook:
    """By the seconds of the plans, times what the newest jobs took of theirs."""
    expected_s = job.expected_s * pace
    if job.is_final:
        return Outlook(0, job.started_s, job.ended_s)
    if job.state == "running":
        left_s = expected_s * (1 - job.percent / 100)
        return Outlook(0, job.started_s, now_s + left_s)
    seq = sa.select(jobs.c.seq).where(jobs.c.id == job.id).scalar_subquery()
    earlier = sa.or_(
        jobs.c.priority > job.priority,
        sa.and_(jobs.c.priority == job.priority, jobs.c.seq < seq),
    )
    before = sa.select(sa.func.count(), sa.func.sum(jobs.c.expected_s)).where(
        jobs.c.state == "queued", earlier
    )
    running = sa.select(sa.func.sum(jobs.c.expected_s * (1 - jobs.c.percent / 100))).where(
        jobs.c.state == "running"
    )
    position, before_s = connection.execute(before).one()
    running_s = connection.scalar(running) or 0.0
    starts_s = now_s + pace * ((before_s or 0.0) + running_s) / max(1, workers)
    return Outlook(position, starts_s, starts_s + expected_s)


def pace(connection: sa.Connection) -> float:
    """Seconds that jobs took for each second of their plans: the median of the newest; 1 without.

    The planner knows the machine, not what else runs on it.
    """
    query = (
        sa.select(jobs.c.started_s, jobs.c.ended_s, jobs.c.expected_s)
        .where(jobs.c.state == "completed", jobs.c.cached.is_(False), jobs.c.expected_s > 0)
        .order_by(jobs.c.seq.desc())
        .limit(PACE_JOBS)
    )
    ratios = [
        (ended_s - started_s) / expected_s
        for started_s, ended_s, expected_s in connection.execute(query)
    ]
    if not ratios:
        return 1.0
    slowest, fastest = max(PACE_RANGE), min(PACE_RANGE)
    return float(min(slowest, max(fastest, statistics.median(ratios))))
