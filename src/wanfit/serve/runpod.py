"""The RunPod-shaped face: what a client of a RunPod endpoint says and hears, from this machine.

    POST /run, /runsync?wait=ms · GET /status/{id}, /stream/{id} · POST /cancel/{id}, /retry/{id}
    GET /health · POST /purge-queue        and all of them under /v2/{endpoint}/ too

Two shapes of input: `{"input": {fields of a clip}}`, and the older
`{"input": {"action": "request" | "status", "params": {...}, "return_video": true}}`. An answer has
the clip as an address, or in base64 where it was asked for and is small enough for RunPod's own
limit of 10 MB. Beyond RunPod, every status has the place in the queue. Left out: `s3Config`, which
is refused: clips go where the server keeps them.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from starlette.requests import Request

from wanfit.errors import NoSuchJob
from wanfit.jobs.job import Job, JobEvent, new_id
from wanfit.serve import describe
from wanfit.serve.bodies import Picture, read_object
from wanfit.serve.door import Asked
from wanfit.serve.hall import Hall, caller_of, hall_of
from wanfit.serve.problems import Problem, no_such_job
from wanfit.serve.runpod_input import read_envelope, read_input
from wanfit.serve.runpod_view import STATUSES, base64_of, status_json, status_of
from wanfit.serve.views import queue_json

DEFAULT_WAIT_MS, WAIT_RANGE_MS = 90_000, (1000, 300_000)  # RunPod's, of /runsync
MAX_RETRIES = 20  # ours: each is one more look-up at the end
STREAM_WAIT_S = 2.0  # ours: how long /stream waits for something to tell
MAX_CURSORS = 10_000  # ours: jobs whose streams are remembered
RETRIABLE = ("failed", "expired")
ASKED_ID = "ask-"  # of a job that only asks for another's status

_RETRY = re.compile(r"(?P<base>.+)-r(?P<count>\d{1,2})")
_IDS = describe.thing({"id": {"type": "string"}, "status": {"enum": list(STATUSES.values())}})
_RUN = describe.json_body(
    describe.thing(
        {"input": describe.video_fields()},
        {
            "webhook": {"type": "string", "format": "uri"},
            "policy": {
                "type": "object",
                "properties": {
                    "executionTimeout": {"type": "integer"},
                    "ttl": {"type": "integer"},
                    "lowPriority": {"type": "boolean"},
                },
            },
        },
    )
)
JobId = Annotated[str, Path(max_length=100)]


class RunpodFace:
    """The routes. It remembers what each stream has told; after a restart a stream begins anew."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, int] = OrderedDict()

    def router(self) -> APIRouter:
        """The routes, without their two prefixes."""
        router = APIRouter(tags=["runpod"])
        errors = describe.errors("runpod")
        status = {**describe.answer(_IDS), **errors}
        for path, call, extra in (
            ("/run", self.run, _RUN),
            ("/runsync", self.runsync, _RUN),
            ("/cancel/{job_id}", self.cancel, None),
            ("/retry/{job_id}", self.retry, None),
            ("/purge-queue", self.purge_queue, None),
        ):
            answers = errors | describe.answer(
                describe.thing({"removed": {"type": "integer"}}) if "purge" in path else _IDS
            )
            router.post(path, responses=answers, openapi_extra=extra)(call)
        router.get("/status/{job_id}", responses=status)(self.status)
        router.get("/stream/{job_id}", responses=errors | describe.answer(
            describe.thing({"status": {"type": "string"}, "stream": {"type": "array"}})
        ))(self.stream)  # fmt: skip
        router.get("/health", responses=errors | describe.answer(
            describe.thing({"jobs": {"type": "object"}, "workers": {"type": "object"}})
        ))(self.health)  # fmt: skip
        return router

    async def run(self, request: Request) -> JSONResponse:
        """Accepts a clip and answers at once."""
        hall = hall_of(request)
        body = await read_object(request)
        order = read_input(body)
        if order.status_of is not None:
            job = await self._find(request, order.status_of)
            return JSONResponse({"id": ASKED_ID + order.status_of, "status": status_of(job)})
        asked = read_envelope(body, order, f"{new_id()}-u1")
        job, _ = await hall.door.admit(asked, caller_of(request))
        view = await hall.look(job, hall.base_url(request))
        return JSONResponse(
            {"id": job.id, "status": status_of(job), "queue": queue_json(view.outlook)}
        )

    async def runsync(
        self,
        request: Request,
        wait: Annotated[int, Query(ge=WAIT_RANGE_MS[0], le=WAIT_RANGE_MS[1])] = DEFAULT_WAIT_MS,
    ) -> JSONResponse:
        """Accepts a clip and waits for it, for so many milliseconds; then it goes on in /status."""
        hall = hall_of(request)
        body = await read_object(request)
        order = read_input(body)
        if order.status_of is not None:
            return JSONResponse(await self._asked_status(request, order.status_of))
        asked = read_envelope(body, order, f"sync-{new_id()}-u1")
        job, _ = await hall.door.admit(asked, caller_of(request))
        job = await hall.desk.wait_final(job, wait / 1000)
        return JSONResponse(await self._status_json(hall, request, job, job.id))

    async def status(self, request: Request, job_id: JobId) -> JSONResponse:
        """Where a job is, and its clip once there is one."""
        if job_id.startswith(ASKED_ID):
            return JSONResponse(await self._asked_status(request, job_id.removeprefix(ASKED_ID)))
        hall = hall_of(request)
        view = await hall.see(request, job_id)
        if view.job.state in RETRIABLE:
            job = await self._find(request, job_id)
            view = await hall.look(job, hall.base_url(request))
        return JSONResponse(status_json(view, job_id, await base64_of(hall, view.job)))

    async def stream(self, request: Request, job_id: JobId) -> JSONResponse:
        """What happened since the last call: steps, previews, and the clip at the end."""
        hall = hall_of(request)
        job = await self._find(request, job_id)
        after = self._told.get(job.id, 0)
        events = await hall.desk.read(hall.desk.store.events, job.id, after)
        if not events and (not job.is_final or job.state == "cancelled"):
            # The SDK asks again at once, and takes CANCELLED for no end.
            await hall.desk.wait_change(job, STREAM_WAIT_S)
            job = await self._find(request, job_id)
            events = await hall.desk.read(hall.desk.store.events, job.id, after)
        if events:
            self._told[job.id] = events[-1].seq
            self._told.move_to_end(job.id)
            while len(self._told) > MAX_CURSORS:
                self._told.popitem(last=False)
        told = [await self._told_of(hall, request, job, event) for event in events]
        return JSONResponse({
            "status": status_of(job),
            "stream": [{"output": output} for output in told if output is not None],
        })  # fmt: skip

    async def cancel(self, request: Request, job_id: JobId) -> JSONResponse:
        """Takes a job out of the queue, or stops it within one step."""
        job = await self._find(request, job_id)
        hall = hall_of(request)
        job = await hall.desk.cancel(job.id, job.owner)
        status = "CANCELLED" if job.cancel_requested and not job.is_final else status_of(job)
        return JSONResponse({"id": job_id, "status": status})

    async def retry(self, request: Request, job_id: JobId) -> JSONResponse:
        """Makes a job that failed or timed out once more, under its old id."""
        hall = hall_of(request)
        job = await self._find(request, job_id)
        if job.state not in RETRIABLE:
            raise Problem(400, "not_retriable", f"Job {job_id} is {status_of(job)}, so no retry")
        found = _RETRY.fullmatch(job.id)
        base, count = (found["base"], int(found["count"])) if found else (job.id, 0)
        if count >= MAX_RETRIES:
            raise Problem(400, "not_retriable", f"Job {job_id} was retried {count} times")
        image = await hall.desk.read(hall.desk.store.image, job.id) if job.has_image else None
        asked = Asked(
            face="runpod",
            fields=job.request,
            picture=None if image is None else Picture(data=image),
            id=f"{base}-r{count + 1}",
            priority=job.priority,
            timeout_s=job.timeout_s,
            webhook=job.webhook,
            extra=job.extra,
        )
        fresh, _ = await hall.door.admit(asked, caller_of(request))
        return JSONResponse({"id": job_id, "status": status_of(fresh)})

    async def purge_queue(self, request: Request) -> JSONResponse:
        """Cancels all of the caller's jobs that wait."""
        hall, owner = hall_of(request), caller_of(request).id
        removed = 0
        for job in await hall.desk.read(hall.desk.store.queued, owner):
            removed += (await hall.desk.cancel(job.id, owner)).state == "cancelled"
        return JSONResponse({"removed": removed, "status": "completed"})

    async def health(self, request: Request) -> JSONResponse:
        """How many jobs are where, and what the GPU process does."""
        hall = hall_of(request)
        counts = await hall.desk.counts(caller_of(request).id)
        states = [worker.state for worker in hall.workers()]
        busy = sum(state in ("busy", "keeping") for state in states)
        idle = states.count("idle")
        return JSONResponse({
            "jobs": {
                "completed": counts["completed"],
                "failed": counts["failed"] + counts["expired"],
                "inProgress": counts["running"],
                "inQueue": counts["queued"],
                "retried": 0,
            },
            "workers": {
                "idle": idle,
                "running": busy,
                "ready": idle + busy,
                "initializing": states.count("starting"),
                "throttled": states.count("no_room"),
                "unhealthy": states.count("failing") + states.count("stopped"),
            },
        })  # fmt: skip

    async def _find(self, request: Request, job_id: str) -> Job:
        """The caller's job, in its newest retry."""
        hall = hall_of(request)
        job = await hall.find(request, job_id)
        for count in range(1, MAX_RETRIES + 1):
            if job.state not in RETRIABLE:
                break
            try:
                job = await hall.find(request, f"{job_id}-r{count}")
            except NoSuchJob:
                break
        return job

    async def _asked_status(self, request: Request, job_id: str) -> dict[str, Any]:
        """The older shape's question: a job that is done at once, with the answer for output."""
        try:
            job = await self._find(request, job_id)
        except NoSuchJob:
            raise no_such_job(job_id) from None
        hall = hall_of(request)
        answer = await self._status_json(hall, request, job, job_id)
        output = answer.get("output") or {}
        error = {"error": json.loads(answer["error"])} if "error" in answer else {}
        return {
            "id": ASKED_ID + job_id,
            "status": "COMPLETED",
            "delayTime": 0,
            "executionTime": 0,
            "output": {"request_id": job_id, "status": job.state, **output, **error},
        }

    async def _status_json(
        self, hall: Hall, request: Request, job: Job, job_id: str
    ) -> dict[str, Any]:
        view = await hall.look(job, hall.base_url(request))
        return status_json(view, job_id, await base64_of(hall, job))

    async def _told_of(
        self, hall: Hall, request: Request, job: Job, event: JobEvent
    ) -> dict[str, Any] | None:
        """One event as a partial output; None for what a status tells."""
        if event.kind == "completed" and job.state == "completed":
            return (await self._status_json(hall, request, job, job.id)).get("output")
        if event.kind in ("stage", "step", "preview", "notice"):
            return {"kind": event.kind, "percent": round(event.percent, 2), **event.data}
        return None
