"""What the faces share: who asks, the desk, the door, clips, and addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from wanfit.jobs.job import Job
from wanfit.jobs.telemetry import WorkerStatus
from wanfit.outputs import OutputStore
from wanfit.serve.desk import Desk
from wanfit.serve.door import Door
from wanfit.serve.gate import Caller
from wanfit.serve.links import Links
from wanfit.serve.metrics import Metrics
from wanfit.serve.views import Seen, seen
from wanfit.settings import Settings

Health = Literal[
    "ready",  # the next job begins at once
    "busy",  # a job is being made, others wait
    "starting",  # the GPU process is warming up; jobs are accepted
    "no_room",  # the disk is full: jobs are accepted, and wait
    "failing",  # the GPU process does not start
    "draining",  # the server was told to stop
]


@dataclass(frozen=True, slots=True)
class Hall:
    """One per server; each route gets it from the application's state."""

    settings: Settings
    desk: Desk
    door: Door
    outputs: OutputStore
    links: Links
    metrics: Metrics
    workers: Callable[[], tuple[WorkerStatus, ...]]

    def health(self) -> Health:
        """How the server is, as its best worker is."""
        if self.door.is_closed:
            return "draining"
        states = {worker.state for worker in self.workers()}
        if "idle" in states:
            return "ready"
        if states & {"busy", "keeping"}:
            return "busy"
        if "starting" in states:
            return "starting"
        return "no_room" if "no_room" in states else "failing"

    async def look(self, job: Job, base_url: str) -> Seen:
        """The job with its place in the queue and the addresses of its files."""
        return seen(job, await self.desk.outlook(job), self.links, base_url)

    async def see(self, request: Request, job_id: str) -> Seen:
        """The caller's job of that id, as `look` has it. Raises NoSuchJob."""
        job, outlook = await self.desk.see(job_id, caller_of(request).id)
        return seen(job, outlook, self.links, self.base_url(request))

    async def find(self, request: Request, job_id: str) -> Job:
        """The caller's job of that id. Raises NoSuchJob: for another's, too."""
        return await self.desk.get(job_id, caller_of(request).id)

    def base_url(self, request: Request) -> str:
        """The address by which clients reach this server; the Host header was checked."""
        if self.settings.public_url:
            return self.settings.public_url
        return f"{request.url.scheme}://{request.url.netloc}"


def hall_of(request: Request) -> Hall:
    """For routes."""
    hall = request.app.state.hall
    assert isinstance(hall, Hall)
    return hall


def caller_of(request: Request) -> Caller:
    """Who the gate let in."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller
