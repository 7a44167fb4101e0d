"""The durable queue: everything that may happen to a job, each as one transaction.

SQLite by default, Postgres by URL with the same code. Accepted means on disk. Safe to use from
many threads, many processes and, on Postgres, many machines. This file is the table of contents;
the rules are in `admission`, `attempts`, `reaping`, `reading` and `outbox`.

Any method may raise DatabaseBusy (locked or away: try again), DiskFull, or BadSetting (no job
database). Nothing is half done then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from wanfit.jobs import admission, attempts, outbox, reading, reaping, rows
from wanfit.jobs.crash_point import crash_point
from wanfit.jobs.database import BUSY_S, Database
from wanfit.jobs.job import (
    Claim,
    EventKind,
    Failure,
    Job,
    JobEvent,
    NewJob,
    Notice,
    Order,
    Outlook,
    Page,
    Progress,
    QueueLimit,
    State,
)
from wanfit.jobs.leases import Stillness
from wanfit.jobs.liveness import is_dead
from wanfit.jobs.schema import jobs
from wanfit.outputs import Kept

# Ours: fifteen heartbeats of a worker; a stalled disk takes seconds, not half a minute.
LEASE_S = 30.0
PACE_AGE_S = 10.0  # ours: for how long the pace of the newest jobs is good


class JobStore:
    """url: a path or `sqlite:///path` for SQLite, `postgresql://...` for Postgres.

    lease_s: how long a worker may be silent. busy_s: how long to wait for a locked database.
    wall_s, monotonic_s: the clocks, for tests that make them jump. Raises BadSetting where the
    database cannot be trusted with jobs: on a network file system, or of a newer wanfit.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_s: float = LEASE_S,
        busy_s: float = BUSY_S,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_s = lease_s
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._leases, self._deadlines, self._waits = (Stillness(monotonic_s) for _ in range(3))
        self._pace = (-PACE_AGE_S, 1.0)  # (moment of asking, answer)
        self._database = Database(url, busy_s=busy_s, wall_s=wall_s)

    @property
    def is_of_one_host(self) -> bool:
        """Whether every worker of this database runs on this machine: SQLite."""
        return self._database.is_of_one_host

    def close(self) -> None:
        self._database.close()

    def listen(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """`callback(job_id)` after each change made through this object, from the thread that made
        it: keep it short, raise nothing. Gives a function that ends it."""
        return self._database.listen(callback)

    # at the door

    def submit(self, new: NewJob, limit: QueueLimit | None = None) -> tuple[Job, bool]:
        """The job, and whether it is a new one: the same id, idempotency key or (within
        `dedupe_s`) body gives the first one again. Raises KeyReused, QueueFull, BadOption."""
        with self._database.write() as tx:
            row, created = admission.submit(tx, new, limit or QueueLimit())
            crash_point("before-accept-commit")
        crash_point("after-accept-commit")
        if new.deadline_s is not None:
            left_s = reaping.left_s(new.deadline_s, self._wall_s())
            self._deadlines.is_over(row["id"], row["deadline_s"], left_s)  # counts from now on
        return rows.job_of(row), created

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Queued: cancelled at once. Running: within one step, by the worker. Final: as it is.
        Raises NoSuchJob."""
        with self._database.write() as tx:
            row = rows.find(tx.connection, job_id, owner)
            if row["state"] == "queued":
                row = rows.finish(tx, row, "cancelled", by=None)
            elif row["state"] == "running" and not row["cancel_requested"]:
                row = rows.change(tx, job_id, cancel_requested=True)
        return rows.job_of(row)

    def delete(self, job_id: str, owner: str | None = None) -> Job:
        """Hides the job from everybody and erases what was asked; a running one is stopped. Gives
        the job as it was. Its files are for the caller, unless they are another job's result too
        (`Supervisor.delete`). Raises NoSuchJob."""
        with self._database.write() as tx:
            row = rows.find(tx.connection, job_id, owner)
            if row["state"] in ("queued", "running"):
                rows.finish(tx, row, "cancelled", by=None)
            rows.erase(tx, row)
        return rows.job_of(row)

    # what clients see. owner=None: anybody's.

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Raises NoSuchJob."""
        with self._database.read() as connection:
            return rows.job_of(rows.find(connection, job_id, owner))

    def image(self, job_id: str) -> bytes | None:
        """The input image of a job, as PNG."""
        with self._database.read() as connection:
            return rows.image_of(connection, job_id)

    def page(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        face: str | None = None,
    ) -> Page:
        """Jobs in the order of acceptance, from the one after `after` on. Raises NoSuchJob."""
        with self._database.read() as connection:
            return reading.page(connection, owner, after=after, limit=limit, order=order, face=face)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """What happened to a job, from the event after `after` on."""
        with self._database.read() as connection:
            return reading.events_after(connection, job_id, after, limit)

    def outlook(self, job: Job, workers: int = 1) -> Outlook:
        """Where it stands in the queue, and when it should start and finish."""
        with self._database.read() as connection:
            asked_s, pace = self._pace
            if self._monotonic_s() - asked_s >= PACE_AGE_S:
                pace = reading.pace(connection)
                self._pace = (self._monotonic_s(), pace)
            now_s = self._wall_s()
            return reading.outlook(connection, job, workers=workers, pace=pace, now_s=now_s)

    def counts(self, owner: str | None = None) -> dict[State, int]:
        """How many jobs are in each state, deleted ones left out."""
        with self._database.read() as connection:
            return reading.counts(connection, owner)

    def queued(self, owner: str | None = None) -> list[Job]:
        """The jobs that wait, the newest first."""
        with self._database.read() as connection:
            return reading.queued(connection, owner)

    def waiting_s(self) -> float:
        """Seconds of work in the queue, by the plans."""
        with self._database.read() as connection:
            return reading.waiting_s(connection)

    # for workers. Raises StaleLease where the claim is not the newest any more.

    def claim(self, worker: str) -> Claim | None:
        """The next job, if one waits. `worker` names the process (`liveness.worker_name`)."""
        with self._database.read() as connection:
            if not self._waits_any(connection):
                return None
        self._expire()
        with self._database.write() as tx:
            row = attempts.claim_next(tx, worker)
            crash_point("before-claim-commit")
        if row is None:
            return None
        crash_point("after-claim-commit")
        return rows.claim_of(row)

    def heartbeat(
        self,
        claim: Claim,
        progress: Progress | None = None,
        events: Sequence[tuple[EventKind, Mapping[str, Any]]] = (),
    ) -> bool:
        """Keeps the lease, notes the progress; True when the job is to be cancelled."""
        with self._database.note() as tx:
            return attempts.beat(tx, claim, progress, events)

    def complete(self, claim: Claim, result: Kept, report: Mapping[str, Any]) -> Job:
        """The end of a job whose files are kept. A job that was cancelled meanwhile stays so: look
        at the state of what is returned."""
        with self._database.write() as tx:
            row = attempts.complete(tx, claim, result, report)
            crash_point("before-complete-commit")
        crash_point("after-complete-commit")
        return rows.job_of(row)

    def fail(self, claim: Claim, failure: Failure) -> Job:
        """The end of a job that cannot be done."""
        with self._database.write() as tx:
            row = attempts.fail(tx, claim, failure)
        return rows.job_of(row)

    def cancelled(self, claim: Claim) -> Job:
        """The worker has stopped a job as it was told."""
        with self._database.write() as tx:
            row = attempts.cancelled(tx, claim)
        return rows.job_of(row)

    def give_back(self, claim: Claim, why: str) -> Job:
        """Into the queue again, at its old place; no loss is counted."""
        with self._database.write() as tx:
            row = attempts.give_back(tx, claim, why)
        return rows.job_of(row)

    def crashed(self, claim: Claim, failure: Failure, *, blame: bool) -> Job:
        """The worker died under the job: queued again, or failed when that was once too often.

        blame: it died of the job, as far as can be told.
        """
        with self._database.write() as tx:
            row = attempts.crashed(tx, claim, failure, blame=blame)
        return rows.job_of(row)

    # what time ends

    def reap(self) -> list[Job]:
        """Ends silent leases and passed deadlines. Call it every few seconds."""
        with self._database.read() as connection:
            leases = reaping.silent_leases(connection, self._leases, self.lease_s)
        return self._end_leases(leases, reaping.SILENT) + self._expire()

    def reap_dead(self) -> list[Job]:
        """Ends the leases of processes that are certainly gone, without waiting for silence."""
        return self._end_leases([claim.lease for claim in self.dead_claims()], reaping.GONE)

    def dead_claims(self) -> list[Claim]:
        """The attempts whose process is certainly gone."""
        same_host = self._database.is_of_one_host
        return [claim for claim in self.running() if is_dead(claim.worker, same_host=same_host)]

    def running(self) -> list[Claim]:
        """Every attempt that has a lease now."""
        query = sa.select(jobs).where(jobs.c.state == "running")
        with self._database.read() as connection:
            return [rows.claim_of(row) for row in connection.execute(query).mappings()]

    # files, for reconciliation

    def results(self) -> dict[str, bool]:
        """The key of the files of each job that has some, and whether they are noted as gone."""
        query = sa.select(jobs.c.result_key, jobs.c.output_gone).where(
            jobs.c.result_key.is_not(None)
        )
        with self._database.read() as connection:
            return {key: gone for key, gone in connection.execute(query)}

    def note_outputs(self, keys: Sequence[str], *, gone: bool) -> list[Job]:
        """Notes that files are gone, or there again; gives the jobs whose they are."""
        if not keys:
            return []
        query = sa.select(jobs.c.id).where(
            jobs.c.result_key.in_(keys), jobs.c.output_gone.is_not(gone)
        )
        with self._database.write() as tx:
            found = tx.connection.scalars(query).all()
            touched = [rows.change(tx, job_id, output_gone=gone) for job_id in found]
        return [rows.job_of(row) for row in touched]

    def is_result(self, key: str) -> bool:
        """Whether some job that is not deleted has these files."""
        query = sa.select(jobs.c.id).where(jobs.c.result_key == key).limit(1)
        with self._database.read() as connection:
            return connection.scalar(query) is not None

    # the outbox

    def due_notices(self, limit: int = 20, hold_s: float = 120.0) -> list[Notice]:
        """Notices to send now; each is held back from others for `hold_s`."""
        with self._database.read() as connection:
            found = outbox.ripe(connection, self._waits, limit)
        if not found:
            return []
        with self._database.write() as tx:
            return outbox.take(tx, found, hold_s)

    def notice_sent(self, notice: Notice) -> None:
        with self._database.write() as tx:
            outbox.sent(tx, notice)

    def notice_failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None:
        """It comes again after `retry_in_s`; None: given up."""
        with self._database.write() as tx:
            outbox.failed(tx, notice, why, retry_in_s)

    def _waits_any(self, connection: sa.Connection) -> bool:
        query = sa.select(jobs.c.seq).where(jobs.c.state == "queued").limit(1)
        return connection.scalar(query) is not None

    def _expire(self) -> list[Job]:
        with self._database.read() as connection:
            passed = reaping.passed_deadlines(connection, self._deadlines, self._wall_s())
        if not passed:
            return []
        with self._database.write() as tx:
            ended = reaping.end_waiting(tx, passed)
        return [rows.job_of(row) for row in ended]

    def _end_leases(self, leases: list[str], failure: Failure) -> list[Job]:
        if not leases:
            return []
        with self._database.write() as tx:
            ended = reaping.end_leases(tx, leases, failure)
        return [rows.job_of(row) for row in ended]
