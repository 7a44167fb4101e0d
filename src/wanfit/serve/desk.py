"""The job store for asynchronous code: each call in a thread, and news of jobs as they come.

A look-up is quick on SQLite, a commit takes the disk's time, and a Postgres may be far away: none
of them may hold up the loop that answers everybody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

from wanfit.errors import WanfitError
from wanfit.jobs.job import (
    ID_PATTERN,
    Job,
    JobEvent,
    NewJob,
    Order,
    Outlook,
    Page,
    QueueLimit,
    State,
)
from wanfit.jobs.store import JobStore
from wanfit.serve.problems import no_such_job

READERS, WRITERS = 4, 4  # ours: a commit that waits for the disk holds up no reader
FILE_READERS = 8  # ours: nor does an S3 that is slow
LOOK_AGAIN_S = 1.0  # for changes that another process made, of which nothing is heard here

P = ParamSpec("P")
T = TypeVar("T")


class Desk:
    """One per server. `owner` is the id of an API key; only its jobs are seen by it."""

    def __init__(
        self,
        store: JobStore,
        delete: Callable[[str, str], Job],
        ended: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """delete: deletes a job of an owner, files and all (`Supervisor.delete`). ended: told of
        every job that is over, whoever ended it; of one more than once."""
        self.store = store
        self._delete = delete
        self._tell_ended = ended
        self._changed: set[str] = set()  # since the last look
        self._looking: asyncio.Task[None] | None = None
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._file_readers = ThreadPoolExecutor(FILE_READERS, thread_name_prefix="file")
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Begins to hear of changes, in the loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._stop_listening = self.store.listen(self._heard)
        self._looking = self._loop.create_task(self._look_for_ends())

    def close(self) -> None:
        self._stop_listening()
        if self._looking is not None:
            self._looking.cancel()
        for pool in (self._readers, self._file_readers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=True)

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call that waits for no disk to be written."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, partial(call, *args, **kwargs))

    async def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call that may take the time of a commit, or of a picture. It is not abandoned
        when the client goes away: what was accepted stays accepted."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writers, partial(call, *args, **kwargs))

    async def read_file(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call to the store of clips."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._file_readers, partial(call, *args, **kwargs))

    async def submit(self, new: NewJob, limit: QueueLimit) -> tuple[Job, bool]:
        """Raises KeyReused, QueueFull."""
        return await self.write(self.store.submit, new, limit)

    async def get(self, job_id: str, owner: str) -> Job:
        """Raises NoSuchJob for a job that is not there or is another owner's, Problem for an id
        that nobody has."""
        return await self.read(self.store.get, _checked(job_id), owner)

    async def see(self, job_id: str, owner: str) -> tuple[Job, Outlook]:
        """A job with its place in the queue, in one trip to the database's thread."""
        return await self.read(self._see, _checked(job_id), owner)

    def _see(self, job_id: str, owner: str) -> tuple[Job, Outlook]:
        job = self.store.get(job_id, owner)
        return job, self.store.outlook(job)

    async def outlook(self, job: Job) -> Outlook:
        return await self.read(self.store.outlook, job)

    async def page(
        self, owner: str, *, after: str | None, limit: int, order: Order, face: str | None = None
    ) -> Page:
        if after is not None:
            _checked(after)
        return await self.read(
            self.store.page, owner, after=after, limit=limit, order=order, face=face
        )

    async def counts(self, owner: str | None = None) -> dict[State, int]:
        return await self.read(self.store.counts, owner)

    async def cancel(self, job_id: str, owner: str) -> Job:
        return await self.write(self.store.cancel, _checked(job_id), owner)

    async def delete(self, job_id: str, owner: str) -> Job:
        return await self.write(self._delete, _checked(job_id), owner)

    async def wait_final(self, job: Job, wait_s: float) -> Job:
        """The job once it is over, or as it is after `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        with self._listening(job.id) as changed:
            while (
                not job.is_final
                and not self._ended
                and (left_s := deadline_s - time.monotonic()) > 0
            ):
                await _either(changed, min(left_s, LOOK_AGAIN_S))
                job = await self.get(job.id, job.owner)
        return job

    async def wait_change(self, job: Job, wait_s: float) -> None:
        """Until something happens to a job, or for so long."""
        with self._listening(job.id) as changed:
            await _either(changed, wait_s)

    async def follow(self, job: Job, after: int) -> AsyncIterator[JobEvent]:
        """What happened to a job and what happens to it, from the event after `after` on, to its
        end. One that is deleted ends here too."""
        with self._listening(job.id) as changed:
            while True:
                for event in await self.read(self.store.events, job.id, after):
                    after = event.seq
                    yield event
                if job.is_final or self._ended:
                    return
                await _either(changed, LOOK_AGAIN_S)
                job = await self.get(job.id, job.owner)

    async def watch(self, job: Job) -> AsyncGenerator[Job, None]:
        """The job at each change, and once a second at least, to its end."""
        with self._listening(job.id) as changed:
            while True:
                job = await self.get(job.id, job.owner)
                yield job
                if job.is_final or self._ended:
                    return
                await _either(changed, LOOK_AGAIN_S)

    def end_waiting(self) -> None:
        """Ends all that waits for a job: the server closes."""
        self._ended = True
        for job_id in list(self._waiting):
            self._wake(job_id)

    def _heard(self, job_id: str) -> None:
        """Called in whatever thread made a change."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits in it
                self._loop.call_soon_threadsafe(self._wake, job_id)

    async def _look_for_ends(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            changed, self._changed = self._changed, set()
            for job_id in changed:
                try:
                    self._tell_ended(await self.read(self.store.get, job_id))
                except WanfitError:  # deleted meanwhile, or the database is busy
                    continue

    def _wake(self, job_id: str) -> None:
        self._changed.add(job_id)
        for event in self._waiting.get(job_id, ()):
            event.set()

    def _listening(self, job_id: str) -> _Listening:
        return _Listening(self._waiting, job_id)


class _Listening:
    """An event that is set at every change of one job, for as long as the block lasts."""

    def __init__(self, waiting: dict[str, set[asyncio.Event]], job_id: str) -> None:
        self._waiting, self._job_id = waiting, job_id
        self._event = asyncio.Event()

    def __enter__(self) -> asyncio.Event:
        self._waiting.setdefault(self._job_id, set()).add(self._event)
        return self._event

    def __exit__(self, *error: object) -> None:
        events = self._waiting[self._job_id]
        events.discard(self._event)
        if not events:
            del self._waiting[self._job_id]


async def _either(changed: asyncio.Event, wait_s: float) -> None:
    """Waits for a change, or for so long."""
    try:
        async with asyncio.timeout(wait_s):
            await changed.wait()
    except TimeoutError:
        pass
    changed.clear()


def _checked(job_id: str) -> str:
    if not ID_PATTERN.fullmatch(job_id):
        raise no_such_job(job_id)
    return job_id
