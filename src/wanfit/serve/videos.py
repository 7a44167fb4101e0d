"""The OpenAI-shaped face: `/v1/videos` as the official client speaks it, and `/v1/models`.

What differs from OpenAI: models are Wan's; any legal size and length; a cancelled job is `failed`
with the code `cancelled`, since the shape has no word for it and the client's polling helper waits
for the words it has. A POST that the client sends again because our reply was lost makes no second
job: by `Idempotency-Key`, else by the client's own retry count, the same body and the same key
within a while. Left out: edits, extensions and characters, which are refused in words.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from wanfit.errors import WanfitError
from wanfit.jobs.job import Job, new_id
from wanfit.serve import describe
from wanfit.serve.bodies import Picture, digest_of, read_form, read_object
from wanfit.serve.door import Asked
from wanfit.serve.files import send_file
from wanfit.serve.hall import Hall, caller_of, hall_of
from wanfit.serve.problems import Problem, problem_of
from wanfit.serve.videos_input import VideoOrder, param_of, read_order
from wanfit.serve.videos_view import poll_after_ms, video_json
from wanfit.serve.views import Seen
from wanfit.specs import MODELS, spec_named

DEDUPE_S = 120.0  # ours: the client gives up after two retries, at most 8 s apart each
MAX_KEY_CHARS = 255  # of an idempotency key, as Stripe's
MODELS_CREATED = 1_753_660_800  # 2025-07-28, when Wan 2.2 was published
_TEXT, _MAYBE_TEXT, _WHOLE = {"type": "string"}, {"type": ["string", "null"]}, {"type": "integer"}
_VIDEO = describe.thing(
    {
        "id": _TEXT,
        "object": {"const": "video"},
        "created_at": _WHOLE,
        "model": _TEXT,
        "progress": _WHOLE,
        "seconds": _TEXT,
        "size": _TEXT,
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
    },
    {"prompt": _MAYBE_TEXT, "remixed_from_video_id": _MAYBE_TEXT, "queue": {"type": "object"}},
)
_LIST = describe.thing(
    {
        "object": {"const": "list"},
        "data": {"type": "array", "items": _VIDEO},
        "has_more": {"type": "boolean"},
        "first_id": _MAYBE_TEXT,
        "last_id": _MAYBE_TEXT,
    }
)
_CREATE = describe.video_fields()
_CREATE["properties"].update(
    seconds={"type": ["string", "number"], "description": "The length; num_frames leads over it"},
    fps={"type": ["string", "number"], "description": "The model's own, or it is refused"},
    input_reference={"type": ["string", "object"], "description": "The first frame"},
    extra_body={"type": ["string", "object"], "description": "More of these fields"},
)
_ERRORS = describe.errors("openai")
JobId = Annotated[str, Path(max_length=100)]

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/videos",
    responses=_ERRORS | describe.answer(_VIDEO),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": _CREATE} for kind in ("application/json", "multipart/form-data")
            },
        }
    },
)
async def create(request: Request) -> JSONResponse:
    """Accepts a video."""
    hall = hall_of(request)
    form = await read_form(request)
    order = read_order(form, hall.settings.model)
    asked = _asked(order, form.digest(), request)
    job = await _admit(hall, request, asked)
    return await _video_response(hall, request, job)


@router.get("/videos", responses=_ERRORS | describe.answer(_LIST))
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> JSONResponse:
    """The caller's videos, newest first; `after` is the last id of the page before."""
    hall = hall_of(request)
    page = await hall.desk.page(
        caller_of(request).id, after=after, limit=limit, order=order, face="openai"
    )
    base_url = hall.base_url(request)
    data = [video_json(await hall.look(job, base_url)) for job in page.jobs]
    return JSONResponse({
        "object": "list",
        "data": data,
        "has_more": page.has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    })  # fmt: skip


def _refuse(what: str) -> Problem:
    return Problem(
        400, "unsupported", f"This server makes no {what}",
        hint="It makes videos from text and a first picture, and remixes",
    )  # fmt: skip


@router.post("/videos/edits", responses=_ERRORS, include_in_schema=False)
@router.post("/videos/extensions", responses=_ERRORS, include_in_schema=False)
@router.post("/videos/characters", responses=_ERRORS, include_in_schema=False)
async def refuse_others(request: Request) -> None:
    """Of the same API, and not of these models."""
    raise _refuse(request.url.path.rsplit("/", 1)[-1])


@router.get("/videos/characters/{character_id}", include_in_schema=False)
async def refuse_character(request: Request, character_id: str) -> None:
    """Of the same API, and not of these models."""
    raise _refuse("characters")


@router.get("/videos/{video_id}", responses=_ERRORS | describe.answer(_VIDEO))
async def retrieve(request: Request, video_id: JobId) -> JSONResponse:
    """Where a video is."""
    return _respond(await hall_of(request).see(request, video_id))


@router.delete(
    "/videos/{video_id}",
    responses=_ERRORS | describe.answer(
        describe.thing({"id": _TEXT, "object": _TEXT, "deleted": {"type": "boolean"}})
    ),
)  # fmt: skip
async def delete(request: Request, video_id: JobId) -> JSONResponse:
    """Deletes a video and what was asked; one that is being made is stopped."""
    hall = hall_of(request)
    await hall.desk.delete(video_id, caller_of(request).id)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


@router.head("/videos/{video_id}/content", include_in_schema=False)
@router.get("/videos/{video_id}/content", responses=describe.file_answers("openai"))
async def content(
    request: Request,
    video_id: JobId,
    variant: Annotated[Literal["video", "thumbnail", "spritesheet"], Query()] = "video",
) -> Response:
    """The bytes of a finished video, its thumbnail, or a sheet of its frames; ranges too."""
    hall = hall_of(request)
    job = await hall.find(request, video_id)
    return await send_file(request, hall.desk, hall.outputs, job, variant)


@router.post(
    "/videos/{video_id}/remix",
    responses=_ERRORS | describe.answer(_VIDEO),
    openapi_extra=describe.json_body(describe.thing({"prompt": _TEXT})),
)
async def remix(request: Request, video_id: JobId) -> JSONResponse:
    """The same settings, seed and picture with another prompt."""
    hall = hall_of(request)
    body = await read_object(request)
    unknown = sorted(set(body) - {"prompt"})
    if unknown or "prompt" not in body:
        what = f"Unknown parameter: {unknown[0][:100]!r}" if unknown else "prompt is missing"
        code = "unknown_parameter" if unknown else "missing_parameter"
        raise Problem(400, code, what, param=unknown[0][:100] if unknown else "prompt")
    source = await hall.find(request, video_id)
    if source.state != "completed":
        raise Problem(400, "not_completed", f"Video {video_id} is not completed, so no remix of it")
    image = await hall.desk.read(hall.desk.store.image, source.id) if source.has_image else None
    order = VideoOrder(
        fields={**source.request, "prompt": body["prompt"]},
        picture=None if image is None else Picture(data=image),
        seconds=source.extra.get("seconds"),
    )
    digest = digest_of({"remix": source.id, **body})
    asked = _asked(order, digest, request, remixed_from=source.id)
    return await _video_response(hall, request, await _admit(hall, request, asked))


@router.get(
    "/models", responses=_ERRORS | describe.answer(describe.thing({"data": {"type": "array"}}))
)
async def models(request: Request) -> JSONResponse:
    """The models that this machine has the weights of."""
    here = await _servable(hall_of(request))
    return JSONResponse({"object": "list", "data": [_model_json(name) for name in here]})


@router.get("/models/{model}", responses=_ERRORS | describe.answer(describe.thing({"id": _TEXT})))
async def model(request: Request, model: Annotated[str, Path(max_length=100)]) -> JSONResponse:
    """One of them."""
    if model not in await _servable(hall_of(request)):
        raise Problem(404, "model_not_found", f"There is no model {model!r} here", param="model")
    return JSONResponse(_model_json(model))


def _asked(
    order: VideoOrder, digest: str, request: Request, remixed_from: str | None = None
) -> Asked:
    """With what makes a repeated POST the same job."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise Problem(400, "bad_header", f"Idempotency-Key has 1 to {MAX_KEY_CHARS} characters")
    again = request.headers.get("x-stainless-retry-count", "0").strip()
    is_retry = again.isascii() and again.isdecimal() and int(again[:9]) > 0
    extra: dict[str, Any] = {"seconds": order.seconds}
    if remixed_from is not None:
        extra["remixed_from"] = remixed_from
    return Asked(
        face="openai",
        fields=order.fields,
        picture=order.picture,
        id=f"video_{new_id()}",
        idempotency_key=key,
        body_hash=digest,
        dedupe_s=DEDUPE_S if is_retry else None,
        extra=extra,
    )


async def _admit(hall: Hall, request: Request, asked: Asked) -> Job:
    """Raises Problem with the field that an error is about."""
    try:
        job, _ = await hall.door.admit(asked, caller_of(request))
    except WanfitError as error:
        raise problem_of(error, param=param_of(error, asked.fields)) from None
    return job


async def _video_response(hall: Hall, request: Request, job: Job) -> JSONResponse:
    return _respond(await hall.look(job, hall.base_url(request)))


def _respond(view: Seen) -> JSONResponse:
    headers = {"openai-poll-after-ms": str(poll_after_ms(view))}
    return JSONResponse(video_json(view), headers=headers)


async def _servable(hall: Hall) -> list[str]:
    """Names of the models whose weights are here and run as they are."""

    def look() -> list[str]:
        from wanfit.engine.weights.locate import locate

        found = []
        for spec in MODELS:
            try:
                locate(spec, None, "auto")
            except WanfitError:
                continue
            found.append(spec.name)
        return found

    return await hall.desk.read_file(look)


def _model_json(name: str) -> dict[str, Any]:
    spec = spec_named(name)
    return {
        "id": name,
        "object": "model",
        "created": MODELS_CREATED,
        "owned_by": "wanfit" if name == "demo" else "Wan-AI",
        "summary": spec.summary,
    }
