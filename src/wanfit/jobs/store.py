"""The durable queue: everything that may happen to a job, each as one transaction.

SQLite by default, Postgres by URL with the same code. Accepted means on disk. Safe to use from
many threads and, on Postgres, many hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


class JobStore:
    """url: a path or `sqlite:///path` for SQLite, `postgresql://...` for Postgres.

    Raises BadSetting where the database cannot be trusted with jobs (a network file system, a newer
    schema), DatabaseBusy where it is locked or away for too long, DiskFull.
    """

    def __init__(self, url: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def listen(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """`callback(job_id)` after each change made through this object, from the thread that made
        it: keep it short, raise nothing. Gives a function that ends it."""
        raise NotImplementedError

    # at the door

    def submit(self, new: NewJob, limit: QueueLimit | None = None) -> tuple[Job, bool]:
        """The job, and whether it is a new one: the same id, idempotency key or (within
        `dedupe_s`) body gives the first one again. Raises KeyReused, QueueFull."""
        raise NotImplementedError

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Queued: cancelled at once. Running: within one step, by the worker. Final: as it is."""
        raise NotImplementedError

    def delete(self, job_id: str, owner: str | None = None) -> Job:
        """Hides the job from everybody and erases what was asked; a running one is stopped. Gives
        the job as it was. `Supervisor.delete` removes its files too."""
        raise NotImplementedError

    # what clients see. owner=None: anybody's. Raises NoSuchJob.

    def get(self, job_id: str, owner: str | None = None) -> Job:
        raise NotImplementedError

    def image(self, job_id: str) -> bytes | None:
        """The input image of a job, as PNG."""
        raise NotImplementedError

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
        raise NotImplementedError

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """What happened to a job, from the event after `after` on."""
        raise NotImplementedError

    def outlook(self, job: Job, workers: int = 1) -> Outlook:
        raise NotImplementedError

    def counts(self, owner: str | None = None) -> dict[State, int]:
        """How many jobs are in each state, deleted ones left out."""
        raise NotImplementedError

    # for workers. Raises StaleLease where the claim is not the newest any more.

    def claim(self, worker: str) -> Claim | None:
        """The next job, if one waits. `worker` names the process (`wanfit.jobs.worker_name`)."""
        raise NotImplementedError

    def heartbeat(
        self,
        claim: Claim,
        progress: Progress | None = None,
        events: Sequence[tuple[EventKind, Mapping[str, Any]]] = (),
    ) -> bool:
        """Keeps the lease, notes the progress; True when the job is to be cancelled."""
        raise NotImplementedError

    def complete(self, claim: Claim, result: Mapping[str, Any], report: Mapping[str, Any]) -> Job:
        """The end of a job whose files are kept. A job that was cancelled meanwhile stays so: look
        at the state of what is returned."""
        raise NotImplementedError

    def fail(self, claim: Claim, failure: Failure) -> Job:
        raise NotImplementedError

    def cancelled(self, claim: Claim) -> Job:
        """The worker has stopped a job as it was told."""
        raise NotImplementedError

    def give_back(self, claim: Claim, why: str) -> Job:
        """Into the queue again, at its old place; the attempt does not count."""
        raise NotImplementedError

    def crashed(self, claim: Claim, failure: Failure, *, blame: bool) -> Job:
        """The worker died under the job: queued again, or failed with `failure` when it is the
        second death for which the job is to blame, or the last attempt."""
        raise NotImplementedError

    def reap(self) -> list[Job]:
        """Ends what time has ended: leases without a heartbeat, deadlines. Gives what changed."""
        raise NotImplementedError

    def outputs_gone(self, keys: Sequence[str]) -> int:
        """Notes that files were swept; gives how many jobs that touches."""
        raise NotImplementedError

    # the outbox

    def due_notices(self, limit: int = 20, hold_s: float = 120.0) -> list[Notice]:
        """Notices to send now; each is held back from others for `hold_s`."""
        raise NotImplementedError

    def notice_sent(self, notice: Notice) -> None:
        raise NotImplementedError

    def notice_failed(self, notice: Notice, why: str, retry_in_s: float | None) -> None:
        """None: given up."""
        raise NotImplementedError
