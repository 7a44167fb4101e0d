"""What a worker is made of: the server's desk, door, store and supervisor, without its HTTP."""

from __future__ import annotations

import logging
from contextlib import suppress

from wanfit.errors import WanfitError
from wanfit.jobs.store import JobStore
from wanfit.jobs.supervisor import Supervisor
from wanfit.outputs import Bucket, OutputStore, Retention
from wanfit.outputs.s3 import S3Outputs
from wanfit.serve.desk import Desk
from wanfit.serve.door import Door
from wanfit.serve.parts import engine_of, guard_of, open_outputs
from wanfit.worker.settings import WorkerSettings

log = logging.getLogger("wanfit.worker")
STOP_S = 5.0  # ours: for the GPU process, which makes nothing any more then


class Parts:
    """Made and opened in the SDK's event loop: the SDK forks before, and threads do not fork."""

    def __init__(self, settings: WorkerSettings) -> None:
        server = settings.server
        self.store = JobStore(server.database_url)
        _forget_earlier(self.store)
        self.outputs = _outputs(settings)
        self.supervisor = Supervisor(
            self.store,
            self.outputs,
            [engine_of(server)],
            log_dir=server.data / "logs",
        )
        self.guard = guard_of(server)
        self.desk = Desk(self.store, self.supervisor.delete)
        self.door = Door(server, self.desk, self.guard)
        self.desk.open()
        self.supervisor.start()

    @property
    def has_bucket(self) -> bool:
        return isinstance(self.outputs, S3Outputs)

    def close(self) -> None:
        """Ends the GPU process. A job that still runs goes back to the queue."""
        self.desk.end_waiting()
        self.supervisor.stop(0 if self.store.running() else STOP_S)
        self.door.close()
        self.desk.close()
        if isinstance(self.outputs, S3Outputs):
            self.outputs.close()
        self.store.close()


def _outputs(settings: WorkerSettings) -> OutputStore:
    server, bucket = settings.server, settings.bucket
    if bucket is None:
        return open_outputs(server)
    # It was tried at the start. What lies there is for whoever owns it to keep or to delete.
    kept = Retention(min_free_bytes=server.min_free_bytes)
    return S3Outputs(Bucket(bucket.place, bucket.credentials), server.data / "spool", kept)


def _forget_earlier(store: JobStore) -> None:
    """Cancels what an earlier life of this worker has left: nobody waits for it, and the GPU is
    for what is delivered now. In a database that workers share, others may wait for theirs."""
    if not store.is_of_one_host:
        return
    left = [claim.job for claim in store.running()] + store.queued()
    for job in left:
        with suppress(WanfitError):
            store.cancel(job.id)
    if left:
        log.info("%d jobs of an earlier life of this worker are given up", len(left))
