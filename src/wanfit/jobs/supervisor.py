"""Everything that runs in the server for its jobs: workers, reaping, reconciliation, retention.

Threads of the API process, and no torch in it: each worker has its clips made by a GPU process.
`start` returns at once; `stop` returns when every job has its place. Left out: HTTP, webhooks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from wanfit.errors import StoreFailed, WanfitError
from wanfit.jobs.attempt import Patience
from wanfit.jobs.job import Job
from wanfit.jobs.process import MODULE
from wanfit.jobs.reconcile import Reconciled, reconcile
from wanfit.jobs.store import JobStore
from wanfit.jobs.telemetry import Observation, Observe, WorkerStatus
from wanfit.jobs.wire import Engine
from wanfit.jobs.worker import LAST_WRITES_S, Worker
from wanfit.outputs import OutputStore

log = logging.getLogger(__name__)
REAP_S = 2.0  # ours: how late a passed deadline or a silent lease is noticed
SWEEP_S = 600.0  # ours: retention is a matter of hours
RECONCILE_AGAIN_S = 30.0  # ours: while the store of outputs does not answer


class Supervisor:
    """engines: one worker and one GPU process for each. log_dir: for what those print.

    observe: called with every observation, from the workers' threads.
    """

    def __init__(
        self,
        store: JobStore,
        outputs: OutputStore,
        engines: Sequence[Engine] = (Engine(),),
        *,
        log_dir: Path,
        observe: Observe = lambda _: None,
        patience: Patience | None = None,
        module: str = MODULE,
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self.reconciled: Reconciled | None = None
        self._store = store
        self._outputs = outputs
        self._observe = observe
        self._ending = threading.Event()
        self._workers = [
            Worker(
                slot,
                store,
                outputs,
                engine,
                log_path=log_dir / f"gpu-{slot}.log",
                observe=self._told,
                patience=patience or Patience(),
                module=module,
            )
            for slot, engine in enumerate(engines)
        ]
        self._forget = store.listen(lambda _: self.nudge())
        self._upkeep = threading.Thread(target=self._keep_up, name="wanfit-upkeep", daemon=True)

    def start(self) -> None:
        """Warms the GPU processes, brings files and rows together, and then takes jobs."""
        for worker in self._workers:
            worker.start()
        self._upkeep.start()

    def stop(self, grace_s: float) -> None:
        """Drains: jobs that run may finish within the grace, or go back to the queue."""
        self._ending.set()
        self._forget()
        for worker in self._workers:
            worker.drain(grace_s)
        for thread, patience_s in (
            *((worker, grace_s + 2 * LAST_WRITES_S) for worker in self._workers),
            (self._upkeep, LAST_WRITES_S),
        ):
            if thread.is_alive():
                thread.join(patience_s)

    def nudge(self) -> None:
        """There may be a job."""
        for worker in self._workers:
            worker.nudge()

    def status(self) -> tuple[WorkerStatus, ...]:
        """How every worker is, with the process id of its GPU process."""
        return tuple(worker.status() for worker in self._workers)

    def delete(self, job_id: str, owner: str | None = None) -> Job:
        """Deletes a job, and its files where no other job has them. Raises NoSuchJob."""
        job = self._store.delete(job_id, owner)
        if job.result is not None and not self._store.is_result(job.result.key):
            with suppress(StoreFailed, OSError):  # reconciliation finds them
                self._outputs.delete(job.result.key)
        return job

    def _told(self, observation: Observation) -> None:
        try:
            self._observe(observation)
        except Exception:
            log.exception("an observer failed")

    def _keep_up(self) -> None:
        self._reconcile(drafts=True)
        for worker in self._workers:
            worker.may_claim.set()
        self.nudge()
        reconciled_s = swept_s = time.monotonic()
        while not self._ending.wait(REAP_S):
            now_s = time.monotonic()
            try:
                if self._store.reap():
                    self.nudge()
                if self.reconciled is None and now_s - reconciled_s > RECONCILE_AGAIN_S:
                    reconciled_s = now_s
                    self._reconcile(drafts=False)
                if now_s - swept_s > SWEEP_S:
                    swept_s = now_s
                    self._sweep()
            except WanfitError as error:
                log.warning("upkeep: %s", error)
            except Exception:
                log.exception("upkeep")

    def _reconcile(self, *, drafts: bool) -> None:
        try:
            self.reconciled = reconcile(self._store, self._outputs, drafts=drafts)
        except (WanfitError, OSError) as error:
            log.warning("files and rows were not brought together: %s", error)

    def _sweep(self) -> None:
        running = {claim.job.id for claim in self._store.running()}
        swept = self._outputs.sweep(time.time(), running)
        self._store.note_outputs([file.key for file in swept.deleted], gone=True)
