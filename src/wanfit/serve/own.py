"""Our own face: what a clip would cost here, and jobs with everything that is known of them.

POST /v1/plan · POST /v1/jobs · GET /v1/jobs, /v1/jobs/{id}, /v1/jobs/{id}/events
POST /v1/jobs/{id}/cancel · DELETE /v1/jobs/{id} · GET /v1/files/{id}/{variant}?end&sign
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from wanfit.errors import NoSuchJob
from wanfit.jobs.job import JobEvent, check_id
from wanfit.outputs import Variant
from wanfit.plan.machine import machine_to_json
from wanfit.plan.show import plan_json
from wanfit.serve import describe
from wanfit.serve.bodies import digest_of, only_picture, read_object
from wanfit.serve.door import Asked
from wanfit.serve.files import send_file
from wanfit.serve.hall import caller_of, hall_of
from wanfit.serve.problems import Problem
from wanfit.serve.videos import MAX_KEY_CHARS
from wanfit.serve.views import iso, job_json

PING_S = 15  # ours: proxies cut a silent connection after 30 to 60 s
MAX_SEQ = 2**31
_ERRORS = describe.errors("own")
_JOB = describe.thing(
    {"id": {"type": "string"}, "state": {"type": "string"}, "queue": {"type": "object"}}
)
_NEW = describe.video_fields()
_NEW["properties"].update(
    priority={"type": "integer", "minimum": -100, "maximum": 100},
    webhook={"type": "string", "format": "uri"},
    timeout_s={"type": "number", "exclusiveMinimum": 0},
)
JobId = Annotated[str, Path(max_length=100)]

router = APIRouter(prefix="/v1", tags=["wanfit"])


@router.post(
    "/plan",
    responses=_ERRORS | describe.answer(
        describe.thing({"fits": {"type": "boolean"}, "elapsed_s": {"type": "number"}})
    ),
    openapi_extra=describe.json_body(describe.video_fields()),
)  # fmt: skip
async def plan(request: Request) -> JSONResponse:
    """What a clip would take on this machine, and when it would be done if it were asked for now.

    422 says by how much it does not fit, and what would.
    """
    hall = hall_of(request)
    body = await read_object(request)
    pictures = {name: body.pop(name) for name in describe.IMAGE_FIELDS if name in body}
    quote = await hall.door.quote(
        {"prompt": "", **body}, only_picture(pictures), caller_of(request)
    )
    counts = await hall.desk.counts()
    waiting_s = await hall.desk.read(hall.desk.store.waiting_s)
    return JSONResponse({
        **plan_json(quote.plan),
        "machine": machine_to_json(hall.door.machine),
        "queue": {
            "queued": counts["queued"],
            "running": counts["running"],
            "expected_wait_s": round(waiting_s, 3),
        },
    })  # fmt: skip


@router.post(
    "/jobs",
    status_code=202,
    responses=_ERRORS | describe.answer(_JOB, 202) | describe.answer(_JOB, 200),
    openapi_extra=describe.json_body(_NEW),
)
async def submit(request: Request) -> JSONResponse:
    """Accepts a clip. 200 where the Idempotency-Key came before: the first job again."""
    hall = hall_of(request)
    body = await read_object(request)
    said = digest_of(body)
    pictures = {name: body.pop(name) for name in describe.IMAGE_FIELDS if name in body}
    priority = body.pop("priority", 0)
    timeout_s, webhook = body.pop("timeout_s", None), body.pop("webhook", None)
    _check(isinstance(priority, int) and abs(priority) <= 100, "priority", "a number, -100 to 100")
    _check(timeout_s is None or _is_time(timeout_s), "timeout_s", "a number of seconds")
    _check(webhook is None or isinstance(webhook, str), "webhook", "an address")
    key = request.headers.get("idempotency-key")
    _check(key is None or 1 <= len(key) <= MAX_KEY_CHARS, "Idempotency-Key", "1 to 255 characters")
    asked = Asked(
        face="own",
        fields=body,
        picture=only_picture(pictures),
        priority=priority,
        idempotency_key=key,
        body_hash=said,
        timeout_s=timeout_s,
        webhook=webhook,
    )
    job, created = await hall.door.admit(asked, caller_of(request))
    view = await hall.look(job, hall.base_url(request))
    return JSONResponse(job_json(view), status_code=202 if created else 200)


@router.get(
    "/jobs", responses=_ERRORS | describe.answer(describe.thing({"jobs": {"type": "array"}}))
)
async def list_jobs(
    request: Request,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> JSONResponse:
    """The caller's jobs of all faces."""
    hall = hall_of(request)
    page = await hall.desk.page(caller_of(request).id, after=after, limit=limit, order=order)
    base_url = hall.base_url(request)
    jobs = [job_json(await hall.look(job, base_url)) for job in page.jobs]
    return JSONResponse({"jobs": jobs, "has_more": page.has_more})


@router.get("/jobs/{job_id}", responses=_ERRORS | describe.answer(_JOB))
async def status(request: Request, job_id: JobId) -> JSONResponse:
    """Everything that is known of a job."""
    return JSONResponse(job_json(await hall_of(request).see(request, job_id)))


@router.get(
    "/jobs/{job_id}/events",
    responses=_ERRORS | {200: {"description": "Events", "content": {"text/event-stream": {}}}},
    response_class=EventSourceResponse,
)
async def events(
    request: Request,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, lt=MAX_SEQ)] = 0,
) -> Response:
    """What happened to a job and what happens, as server-sent events, until it ends.

    A client that comes back with `Last-Event-ID` hears what it missed, after a restart too.
    """
    hall = hall_of(request)
    job = await hall.find(request, job_id)
    last = request.headers.get("last-event-id", "")
    if last.isascii() and last.isdecimal() and len(last) < 10:
        after = int(last)

    async def told() -> AsyncIterator[ServerSentEvent]:
        try:
            async for event in hall.desk.follow(job, after):
                yield ServerSentEvent(
                    json.dumps(event_json(event)), id=str(event.seq), event=event.kind
                )
        except NoSuchJob:  # deleted meanwhile
            return

    return EventSourceResponse(told(), ping=PING_S)


@router.post("/jobs/{job_id}/cancel", responses=_ERRORS | describe.answer(_JOB))
async def cancel(request: Request, job_id: JobId) -> JSONResponse:
    """Takes a job out of the queue, or stops it within one step."""
    hall = hall_of(request)
    job = await hall.desk.cancel(job_id, caller_of(request).id)
    return JSONResponse(job_json(await hall.look(job, hall.base_url(request))))


@router.delete("/jobs/{job_id}", status_code=204, response_class=Response, responses=_ERRORS)
async def delete(request: Request, job_id: JobId) -> Response:
    """Deletes a job with its files and what was asked."""
    await hall_of(request).desk.delete(job_id, caller_of(request).id)
    return Response(status_code=204)


@router.head("/files/{job_id}/{variant}", include_in_schema=False)
@router.get("/files/{job_id}/{variant}", responses=describe.file_answers("own"))
async def file(
    request: Request,
    job_id: JobId,
    variant: Literal["video", "thumbnail", "spritesheet"],
    end: Annotated[str, Query(max_length=20)] = "",
    sign: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """A file by a link that was made for it: no key is asked for, and ranges are served."""
    hall = hall_of(request)
    hall.links.check(job_id, variant, end, sign)
    chosen: Variant = variant
    job = await hall.desk.read(hall.desk.store.get, check_id(job_id))
    return await send_file(request, hall.desk, hall.outputs, job, chosen)


def event_json(event: JobEvent) -> dict[str, Any]:
    """One event; a preview has its picture as a data URL."""
    data = dict(event.data)
    if event.kind == "preview":
        picture = data.pop("base64", "")
        data["image"] = f"data:{data.pop('content_type', 'image/jpeg')};base64,{picture}"
    return {
        "seq": event.seq,
        "job_id": event.job_id,
        "at": iso(event.at_s),
        "kind": event.kind,
        "percent": round(event.percent, 2),
        **data,
    }


def _is_time(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < 1e9


def _check(is_good: bool, name: str, what: str) -> None:
    if not is_good:
        raise Problem(400, "bad_option", f"{name} is not {what}", param=name)
