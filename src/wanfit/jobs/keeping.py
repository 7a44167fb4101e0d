"""A finished clip put away, and its job completed: file, then database, then notification.

    the clip is whole in its draft            engine, which renames it when it is written
    file, directory synced; renamed; synced   OutputStore.keep
    the row, with the notice in the outbox    JobStore.complete, one transaction
    the notice is sent                        whoever empties the outbox

Killed anywhere in between, the job has either no result and runs again, or has it: reconciliation
completes a job whose clip was kept already. A store that does not answer is asked again while the
clip waits in its draft and the job holds its lease. A draft that was lost is made again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanfit.errors import DiskFull, StaleLease, StoreFailed, WanfitError
from wanfit.jobs.attempt import Attempt
from wanfit.jobs.crash_point import crash_point
from wanfit.jobs.job import Failure, Job
from wanfit.jobs.store import JobStore
from wanfit.outputs import Kept, OutputStore, key_of

log = logging.getLogger(__name__)
WAITS_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # ours: between tries of a store; the last one again and again
BEAT_S = 0.5  # ours: how often a lease is looked after while files are put away

# Makes a write of the database until it is made; None when the lease is lost or the server ends.
Commit = Callable[[Callable[[], Job]], Job | None]


class Keeper:
    """Puts clips away for one worker."""

    def __init__(self, store: JobStore, outputs: OutputStore, commit: Commit) -> None:
        self._store = store
        self._outputs = outputs
        self._commit = commit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wanfit-keep")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def keep(
        self,
        attempt: Attempt,
        draft: Path,
        report: dict[str, Any],
        *,
        patience_s: float,
        must_drain: Callable[[], bool],
    ) -> Job | None:
        """The job as it is then; None: it is another's by now, or waits for the next server."""
        claim = attempt.claim
        crash_point("after-generate")
        attempt.track.keep()
        attempt.note("stage", stage="keep", steps=None)
        kept = self._kept(attempt, draft, report, patience_s=patience_s, must_drain=must_drain)
        crash_point("after-keep")
        match kept:
            case Kept():
                job = self._commit(lambda: self._store.complete(claim, kept, report))
            case Failure():
                return self._commit(lambda: self._store.crashed(claim, kept, blame=True))
            case DiskFull():
                return self._commit(lambda: self._store.give_back(claim, "The disk is full"))
            case None if attempt.stop == "cancelled":
                job = self._commit(lambda: self._store.cancelled(claim))
            case None if must_drain():
                return self._commit(lambda: self._store.give_back(claim, "drained"))
            case None:
                job = None
        if job is None or job.state != "completed":
            # Its key has the lease in it, so it can be nobody else's.
            with suppress(StoreFailed, OSError):  # then reconciliation finds it
                self._outputs.delete(key_of(claim.job.id, claim.lease))
        return job

    def _kept(
        self,
        attempt: Attempt,
        draft: Path,
        report: dict[str, Any],
        *,
        patience_s: float,
        must_drain: Callable[[], bool],
    ) -> Kept | Failure | DiskFull | None:
        """None: nobody wants it any more, or the server ends. Else why it has to be made again."""
        claim = attempt.claim
        # What the process wrote to is a draft; who asks wants to know what it is kept by.
        report["output"] = key_of(claim.job.id, claim.lease)
        metadata = {"request": dict(claim.job.request), "report": report}
        began_s = time.monotonic()
        for count in range(10**9):
            future = self._pool.submit(
                self._outputs.keep,
                draft,
                job_id=claim.job.id,
                attempt=claim.attempt,
                lease=claim.lease,
                metadata=metadata,
            )
            try:
                return _result(future, attempt)
            except (WanfitError, OSError) as error:
                log.warning("job %s: the clip is not kept yet: %s", claim.job.id, error)
                if not draft.is_file() and isinstance(error, DiskFull):
                    return error
                if not draft.is_file():
                    text = "The clip was made, and its file was lost before it was kept"
                    return Failure("output_lost", text)
                if time.monotonic() - began_s > patience_s:
                    text = f"The clip was made, and for {patience_s:.0f} s nothing kept it"
                    return Failure("output_lost", text)
            again_s = time.monotonic() + WAITS_S[min(count, len(WAITS_S) - 1)]
            while time.monotonic() < again_s:
                attempt.beat()
                if attempt.stop is not None or must_drain():
                    return None
                time.sleep(0.05)
        raise AssertionError


def _result(future: Future[Kept], attempt: Attempt) -> Kept:
    """Of a store that may take its time, while the lease is looked after."""
    while True:
        attempt.beat()
        with suppress(NotYet):
            return future.result(timeout=BEAT_S)


def persistently(
    write: Callable[[], Job], give_up: Callable[[], bool], retry_on: tuple[type[WanfitError], ...]
) -> Job | None:
    """Makes a write until the database takes it. None: the lease is lost, or `give_up` says so.

    A write that is not made is no loss: the lease runs out, and the job runs again.
    """
    wait_s = 0.1
    while True:
        try:
            return write()
        except StaleLease as error:
            log.warning("%s", error)
            return None
        except retry_on as error:
            log.warning("the job database does not take a write: %s", error)
        if give_up():
            return None
        time.sleep(wait_s)
        wait_s = min(5.0, 2 * wait_s)
