"""Whether the server lives, whether it can take jobs, and what it counts."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from wanfit.errors import WanfitError
from wanfit.serve import describe
from wanfit.serve.docs_page import CONTENT_SECURITY, docs_page
from wanfit.serve.hall import hall_of
from wanfit.serve.metrics import CONTENT_TYPE

ABLE = ("ready", "busy", "starting", "no_room")  # an accepted job is kept, and will be made

router = APIRouter(tags=["health"])


@router.get("/livez", responses=describe.answer(describe.thing({"status": {"type": "string"}})))
async def livez() -> JSONResponse:
    """200 as long as the server answers at all."""
    return JSONResponse({"status": "alive"})


@router.get(
    "/readyz",
    responses={
        status: {"description": what, "content": {"application/json": {}}}
        for status, what in ((200, "It takes jobs"), (503, "It does not"))
    },
)
async def readyz(request: Request) -> JSONResponse:
    """200 when jobs are accepted; `state` says what becomes of them now."""
    hall = hall_of(request)
    state: str = hall.health()
    try:
        await hall.desk.counts()
    except WanfitError as error:
        state = error.code
    able = state in ABLE
    return JSONResponse({"ready": able, "state": state}, status_code=200 if able else 503)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The routes, as a page."""
    return HTMLResponse(
        docs_page(request.app.openapi()), headers={"content-security-policy": CONTENT_SECURITY}
    )


@router.get(
    "/metrics",
    responses=describe.errors("own")
    | {200: {"description": "Prometheus", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """For Prometheus, which sends a key like everybody where one is asked for."""
    hall = hall_of(request)
    counts = await hall.desk.counts()
    waiting_s = await hall.desk.read(hall.desk.store.waiting_s)
    text = hall.metrics.text(counts, waiting_s, ready=hall.health() in ("ready", "busy"))
    return Response(text, media_type=CONTENT_TYPE)
