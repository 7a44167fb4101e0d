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

import base64
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from starlette.requests import Request

from wanfit.errors import NoSuchJob
from wanfit.jobs.job import Job, JobEvent, new_id
from wanfit.serve import describe
from wanfit.serve.bodies import Picture, only_picture, read_object
from wanfit.serve.door import Asked
from wanfit.serve.hall import Hall, caller_of, hall_of
from wanfit.serve.problems import Problem, no_such_job
from wanfit.serve.views import Seen, error_json, queue_json, report_json

DEFAULT_WAIT_MS, WAIT_RANGE_MS = 90_000, (1000, 300_000)  # RunPod's, of /runsync
EXECUTION_RANGE_MS, TTL_RANGE_MS = (5_000, 604_800_000), (10_000, 604_800_000)  # RunPod's
MAX_BASE64_BYTES = 7_000_000  # of a clip: base64 makes 4/3 of it, and RunPod's answers end at 10 MB
MAX_RETRIES = 20  # ours: each is one more look-up at the end
STREAM_WAIT_S = 2.0  # ours: how long /stream waits for something to tell
MAX_CURSORS = 10_000  # ours: jobs whose streams are remembered
ASKED_ID = "ask-"  # of a job that only asks for another's status

STATUSES: Mapping[str, str] = {
    "queued": "IN_QUEUE",
    "running": "IN_PROGRESS",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
    "expired": "TIMED_OUT",
}
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


@dataclass(frozen=True, slots=True)
class Order:
    """One `input`, read."""

    fields: Mapping[str, Any]
    picture: Picture | None
    wants_base64: bool
    status_of: str | None  # the older shape may ask for a job instead of making one


def read_input(body: Mapping[str, Any]) -> Order:
    """What a body's `input` asks for, in either shape. Raises Problem, BadImage."""
    given = body.get("input")
    if not isinstance(given, dict) or not given:
        raise Problem(400, "bad_input", "The body has no object `input`", param="input")
    if "action" not in given:
        return _order(given, given.get("return_video"))
    action, params = given["action"], given.get("params", {})
    if not isinstance(params, dict):
        raise Problem(400, "bad_input", "`params` is not an object", param="params")
    unknown = sorted(set(given) - {"action", "params", "return_video", "request_id"})
    if unknown:
        raise Problem(400, "bad_option", f"There is no option {unknown[0][:60]!r} beside `action`")
    if action == "request":
        return _order(params, given.get("return_video", params.get("return_video")))
    if action == "status":
        asked = given.get("request_id", params.get("request_id"))
        if not isinstance(asked, str) or not asked:
            raise Problem(400, "bad_input", "`params` has no `request_id`", param="request_id")
        return Order({}, None, _flag(given.get("return_video")), asked)
    raise Problem(400, "bad_input", "`action` is neither 'request' nor 'status'", param="action")


def _order(fields: Mapping[str, Any], return_video: object) -> Order:
    pictures = {name: fields[name] for name in describe.IMAGE_FIELDS if name in fields}
    rest = {
        name: value for name, value in fields.items()
        if name not in pictures and name != "return_video"
    }  # fmt: skip
    return Order(rest, only_picture(pictures), _flag(return_video), None)


def _flag(given: object) -> bool:
    if given in (None, False, "false", 0):
        return False
    if given in (True, "true", 1):
        return True
    raise Problem(
        400, "bad_option", "`return_video` is neither true nor false", param="return_video"
    )


def read_envelope(body: Mapping[str, Any], order: Order, job_id: str) -> Asked:
    """What stands beside `input`. Raises Problem."""
    if body.get("s3Config"):
        raise Problem(
            400, "unsupported", "This server does not write to a client's bucket",
            hint="Leave s3Config out, and fetch the clip from its address", param="s3Config",
        )  # fmt: skip
    policy = body.get("policy") or {}
    if not isinstance(policy, dict):
        raise Problem(400, "bad_input", "`policy` is not an object", param="policy")
    webhook = body.get("webhook")
    if webhook is not None and not isinstance(webhook, str):
        raise Problem(400, "bad_input", "`webhook` is not an address", param="webhook")
    execution_ms = _milliseconds(policy, "executionTimeout", EXECUTION_RANGE_MS)
    ttl_ms = _milliseconds(policy, "ttl", TTL_RANGE_MS)
    return Asked(
        face="runpod",
        fields=order.fields,
        picture=order.picture,
        id=job_id,
        priority=-1 if _flag(policy.get("lowPriority")) else 0,
        deadline_s=None if ttl_ms is None else time.time() + ttl_ms / 1000,
        timeout_s=None if execution_ms is None else execution_ms / 1000,
        webhook=webhook or None,
        extra={"return_video": order.wants_base64},
    )


def _milliseconds(policy: Mapping[str, Any], name: str, allowed: tuple[int, int]) -> int | None:
    given = policy.get(name)
    if given is None:
        return None
    low, high = allowed
    if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
        raise Problem(
            400, "bad_option", f"`policy.{name}` is not a whole number from {low} to {high}",
            param=f"policy.{name}",
        )  # fmt: skip
    return given


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
            return JSONResponse({"id": ASKED_ID + order.status_of, "status": _status(job)})
        asked = read_envelope(body, order, f"{new_id()}-u1")
        job, _ = await hall.door.admit(asked, caller_of(request))
        view = await hall.look(job, hall.base_url(request))
        return JSONResponse(
            {"id": job.id, "status": _status(job), "queue": queue_json(view.outlook)}
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
        job = await self._find(request, job_id)
        return JSONResponse(await self._status_json(hall_of(request), request, job, job_id))

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
            "status": _status(job),
            "stream": [{"output": output} for output in told if output is not None],
        })  # fmt: skip

    async def cancel(self, request: Request, job_id: JobId) -> JSONResponse:
        """Takes a job out of the queue, or stops it within one step."""
        job = await self._find(request, job_id)
        hall = hall_of(request)
        job = await hall.desk.cancel(job.id, job.owner)
        status = "CANCELLED" if job.cancel_requested and not job.is_final else _status(job)
        return JSONResponse({"id": job_id, "status": status})

    async def retry(self, request: Request, job_id: JobId) -> JSONResponse:
        """Makes a job that failed or timed out once more, under its old id."""
        hall = hall_of(request)
        job = await self._find(request, job_id)
        if job.state not in ("failed", "expired"):
            raise Problem(400, "not_retriable", f"Job {job_id} is {_status(job)}, so no retry")
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
        return JSONResponse({"id": job_id, "status": _status(fresh)})

    async def purge_queue(self, request: Request) -> JSONResponse:
        """Cancels all of the caller's jobs that wait."""
        hall, owner = hall_of(request), caller_of(request).id
        removed, after = 0, None
        left = (await hall.desk.counts(owner))["queued"]
        while left > 0:
            page = await hall.desk.page(owner, after=after, limit=200, order="desc")
            for job in page.jobs:
                if job.state == "queued":
                    left -= 1
                    removed += (await hall.desk.cancel(job.id, owner)).state == "cancelled"
            if not page.has_more:
                break
            after = page.jobs[-1].id
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
            if job.state not in ("failed", "expired"):
                break
            try:
                job = await hall.find(request, f"{job_id}-r{count}")
            except NoSuchJob:
                break
        return job

    async def _asked_status(self, request: Request, job_id: str) -> dict[str, Any]:
        """The older shape's question: a job that is done at once, and whose output is the answer."""
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
        video = await _base64_of(hall, job) if job.extra.get("return_video") else None
        return status_json(view, job_id, video)

    async def _told_of(
        self, hall: Hall, request: Request, job: Job, event: JobEvent
    ) -> dict[str, Any] | None:
        """One event as a partial output; None for what a status tells."""
        if event.kind == "completed" and job.state == "completed":
            return (await self._status_json(hall, request, job, job.id)).get("output")
        if event.kind in ("stage", "step", "preview", "notice"):
            return {"kind": event.kind, "percent": round(event.percent, 2), **event.data}
        return None


def status_json(view: Seen, job_id: str, video_base64: str | None = None) -> dict[str, Any]:
    """A job as RunPod tells of one; `queue` is ours. Also what its webhook gets."""
    job = view.job
    now_s = time.time()
    told: dict[str, Any] = {"id": job_id, "status": _status(job), "queue": queue_json(view.outlook)}
    if job.started_s is not None:
        told["delayTime"] = _span_ms(job.created_s, job.started_s)
        told["executionTime"] = _span_ms(job.started_s, job.ended_s or now_s)
    elif job.ended_s is not None:
        told["delayTime"] = _span_ms(job.created_s, job.ended_s)
        told["executionTime"] = 0
    if job.attempts > 1:
        told["retries"] = job.attempts - 1
    if job.state == "completed":
        told["output"] = _output(view, job_id, video_base64)
    elif job.state == "running":
        told["output"] = {
            "percent": round(job.percent, 2), "stage": job.stage, "step": job.step,
            "steps": job.steps,
        }  # fmt: skip
    error = error_json(job)
    if error is not None:
        error.pop("plan", None)
        told["error"] = json.dumps({**error, "request_id": job_id})
    return told


def _output(view: Seen, job_id: str, video_base64: str | None) -> dict[str, Any]:
    job, result = view.job, view.job.result
    assert result is not None
    video = (
        {"video_url": view.urls.get("video")} if video_base64 is None
        else {"video_base64": video_base64}
    )  # fmt: skip
    return {
        "request_id": job_id,
        "status": "completed",
        **video,
        "filename": f"{job.id}.mp4",
        "metadata": {
            **job.request,
            "fps": result.fps,
            "duration_s": round(result.num_frames / result.fps, 3),
            "bytes": result.num_bytes,
            "sha256": result.sha256,
            "content_type": result.content_type,
        },
        "report": report_json(job),
    }


async def _base64_of(hall: Hall, job: Job) -> str | None:
    """The clip itself, where it is small enough to be sent in JSON."""
    result = job.result
    if result is None or job.output_gone or result.num_bytes > MAX_BASE64_BYTES:
        return None

    def read() -> bytes:
        return b"".join(hall.outputs.open(result.key).pieces)

    return base64.b64encode(await hall.desk.read_file(read)).decode()


def _status(job: Job) -> str:
    """RunPod's word; an attempt that took too long is no failure of the work."""
    if job.state == "failed" and job.error is not None and job.error.code == "timed_out":
        return "TIMED_OUT"
    return STATUSES[job.state]


def _span_ms(begin_s: float, end_s: float) -> int:
    """A clock may jump back; no time is negative."""
    return max(0, round(1000 * (end_s - begin_s)))
