"""One worker: a thread that takes jobs, and the GPU process that it has them made by.

The process is warm before a job is taken, and is replaced when it dies. What becomes of a job is
settled here, from the outcome of its attempt.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wanfit.errors import DatabaseBusy, DiskFull, StoreFailed, WanfitError
from wanfit.jobs.attempt import (
    Attempt,
    Died,
    Made,
    NoRoom,
    Outcome,
    Patience,
    Refused,
    Stopped,
)
from wanfit.jobs.crash_point import crash_point
from wanfit.jobs.job import Claim, Failure, Job
from wanfit.jobs.keeping import Keeper, persistently
from wanfit.jobs.liveness import worker_name
from wanfit.jobs.process import MODULE, GpuProcess
from wanfit.jobs.store import JobStore
from wanfit.jobs.telemetry import (
    AttemptEnded,
    JobEnded,
    Observe,
    WorkerState,
    WorkerStatus,
)
from wanfit.jobs.warm import WarmProcess, nap
from wanfit.jobs.wire import Engine
from wanfit.outputs import OutputStore

log = logging.getLogger(__name__)
IDLE_S = 0.5  # ours: how late a job is seen that another process accepted
ROOM_S = 2.0  # ours: between looks at a full disk
LAST_WRITES_S = 10.0  # ours: after the grace, for the database to take what is settled


class Worker(threading.Thread):
    """slot: its number. log_path: what its GPU process prints. module: which program that is."""

    def __init__(
        self,
        slot: int,
        store: JobStore,
        outputs: OutputStore,
        engine: Engine,
        *,
        log_path: Path,
        observe: Observe,
        patience: Patience,
        module: str = MODULE,
    ) -> None:
        super().__init__(name=f"wanfit-worker-{slot}", daemon=True)
        self.may_claim = threading.Event()  # after reconciliation
        self._slot = slot
        self._store = store
        self._outputs = outputs
        self._observe = observe
        self._patience = patience
        self._wake = threading.Event()
        self._drain_s: float | None = None  # when, by the monotonic clock, the grace is over
        self._warm = WarmProcess(
            lambda: GpuProcess(engine, log_path, module),
            ready_s=patience.ready_s,
            observe=observe,
            ends=self._draining,
        )
        self._keeper = Keeper(store, outputs, self._commit)
        self._state: WorkerState = "idle"
        self._job_id: str | None = None

    def nudge(self) -> None:
        """There may be a job."""
        self._wake.set()

    def drain(self, grace_s: float) -> None:
        """Takes no more jobs; the one that runs may have so long, then goes back to the queue."""
        self._drain_s = time.monotonic() + grace_s
        self._wake.set()

    def status(self) -> WorkerStatus:
        warm = self._warm
        return WorkerStatus(
            slot=self._slot,
            state=warm.trouble or self._state,
            pid=warm.pid,
            device=warm.device,
            job_id=self._job_id,
            restarts=warm.restarts,
            last_end=warm.last_end,
            rss_bytes=warm.rss_bytes,
            failed_starts=warm.failed_starts,
        )

    def run(self) -> None:
        try:
            while not self._draining():
                try:
                    self._turn()
                except WanfitError as error:  # the database or the store is away
                    log.warning("worker %d: %s", self._slot, error)
                    self._wait(ROOM_S)
                except Exception:
                    log.exception("worker %d", self._slot)
                    self._wait(ROOM_S)
        finally:
            self._keeper.close()
            self._warm.close()
            self._state = "stopped"

    def _turn(self) -> None:
        """One look for a job, and the job."""
        process = self._warm.get()
        if process is None:
            return
        if not self.may_claim.is_set() or not self._has_room():
            self._wait(IDLE_S)
            return
        claim = self._store.claim(worker_name(self._slot))
        if claim is None:
            self._state = "idle"
            self._wait(IDLE_S)
            return
        self._state, self._job_id = "busy", claim.job.id
        try:
            self._work(process, claim)
        finally:
            self._job_id = None
            self._warm.look()

    def _work(self, process: GpuProcess, claim: Claim) -> None:
        must_drain = self._grace_is_over
        attempt = Attempt(claim, self._store, self._patience, self._observe, must_drain)
        draft: Path | None = None
        try:
            draft = self._outputs.draft(claim.job.id, claim.lease)
            outcome = attempt.run(process, draft)
            log.info("job %s: attempt %d: %s", claim.job.id, claim.attempt, _told(outcome))
            self._settle(attempt, outcome, draft)
        except DiskFull as error:
            self._settle(attempt, NoRoom(str(error)), draft)
        except BaseException:
            # A fault of ours: the job waits for another attempt, and the process may be in it.
            process.kill()
            failure = Failure("internal_error", "A fault of the server ended the attempt")
            self._commit(lambda: self._store.crashed(claim, failure, blame=True))
            raise
        finally:
            if draft is not None:
                shutil.rmtree(draft.parent, ignore_errors=True)
            crash_point("after-clean")

    def _settle(self, attempt: Attempt, outcome: Outcome, draft: Path | None) -> None:
        claim, store = attempt.claim, self._store
        job: Job | None = None
        why = ""
        match outcome:
            case Made(report) if draft is not None:
                self._state = "keeping"
                job = self._keeper.keep(
                    attempt,
                    draft,
                    report,
                    patience_s=self._patience.keep_s,
                    must_drain=self._grace_is_over,
                )
                why = "stale" if job is None else "not_kept"
            case Refused(failure):
                job = self._commit(lambda: store.fail(claim, failure))
            case NoRoom(message):
                self._state, why = "no_room", "no_room"
                log.warning("job %s waits for room on the disk: %s", claim.job.id, message)
                job = self._commit(lambda: store.give_back(claim, "The disk is full"))
                nap(ROOM_S, self._draining)
            case Stopped("cancelled"):
                job = self._commit(lambda: store.cancelled(claim))
            case Stopped("timed_out"):
                failure = _timed_out(claim.job)
                job = self._commit(lambda: store.fail(claim, failure))
            case Stopped("drained"):
                why = "drained"
                job = self._commit(lambda: store.give_back(claim, "The server was stopped"))
            case Died(ending):
                why = ending.failure.code
                self._warm.note_end(ending.failure.code)
                job = self._commit(lambda: store.crashed(claim, ending.failure, blame=ending.blame))
            case _:
                why = "stale"
        self._observe_end(job or claim.job, why)

    def _observe_end(self, job: Job, why: str) -> None:
        if not job.is_final:
            self._observe(AttemptEnded(job, why))
            return
        started_s, ended_s = job.started_s, job.ended_s
        waited_s = None if started_s is None else started_s - job.created_s
        ran_s = None if started_s is None or ended_s is None else ended_s - started_s
        self._observe(JobEnded(job, waited_s, ran_s))

    def _has_room(self) -> bool:
        try:
            self._outputs.check_room()
        except (DiskFull, StoreFailed) as error:
            if self._state != "no_room":
                log.warning("no job is taken: %s", error)
            self._state = "no_room"
            return False
        return True

    def _commit(self, write: Callable[[], Job]) -> Job | None:
        return persistently(write, self._is_last_moment, (DatabaseBusy, DiskFull))

    def _draining(self) -> bool:
        return self._drain_s is not None

    def _grace_is_over(self) -> bool:
        return self._drain_s is not None and time.monotonic() >= self._drain_s

    def _is_last_moment(self) -> bool:
        return self._drain_s is not None and time.monotonic() >= self._drain_s + LAST_WRITES_S

    def _wait(self, seconds: float) -> None:
        """For a nudge, or so long."""
        self._wake.wait(seconds)
        self._wake.clear()


def _timed_out(job: Job) -> Failure:
    return Failure(
        "timed_out",
        f"The attempt took longer than {job.timeout_s:g} s",
        hint="Allow more seconds, or ask for a smaller clip",
        plan=job.plan,
    )


def _told(outcome: Outcome) -> str:
    """One line for the log, without what a stranger wrote."""
    match outcome:
        case Refused(failure):
            return f"refused ({failure.code})"
        case Stopped(reason):
            return f"stopped ({reason})"
        case Died(ending):
            return f"{ending.failure.code}: {ending.failure.message}"
        case NoRoom():
            return "no room"
    return "made"
