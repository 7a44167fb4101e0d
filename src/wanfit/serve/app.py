"""The application: the three faces behind one gate, and what becomes of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from wanfit.errors import WanfitError
from wanfit.serve import health, own, videos
from wanfit.serve.gate import Gate
from wanfit.serve.hall import Hall
from wanfit.serve.keys import Keyring
from wanfit.serve.problems import Problem, face_of, internal_problem, problem_of
from wanfit.serve.runpod import RunpodFace
from wanfit.service import version


def create_app(hall: Hall, keyring: Keyring) -> ASGIApp:
    """The gate with everything behind it. The hall's threads end with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hall.desk.open()
        yield
        hall.door.close()
        hall.desk.close()

    app = FastAPI(
        title="wanfit",
        version=version(),
        summary="Wan 2.2 video models on the GPU and memory you have",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.hall = hall
    face = RunpodFace()
    app.include_router(face.router())  # routes are tried in this order; this one is asked most
    app.include_router(videos.router)
    app.include_router(own.router)
    app.include_router(health.router)
    app.include_router(_under_endpoint(face))
    for kind in (Problem, WanfitError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)

    def watch(scope: Scope, status: int, elapsed_s: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        hall.metrics.answered(scope["method"], route, status, elapsed_s)

    return Gate(app, hall.settings, keyring, watch)


def _under_endpoint(face: RunpodFace) -> APIRouter:
    """The RunPod face by the paths that its clients build from a base address and an endpoint."""
    router = APIRouter(prefix="/v2/{endpoint}", include_in_schema=False)
    router.include_router(face.router())
    return router


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Any error as JSON in the shape of its face. The gate logs what nobody foresaw."""
    match error:
        case Problem():
            problem = error
        case WanfitError():
            problem = problem_of(error)
        case RequestValidationError():
            problem = _invalid(error)
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code, "http_error"
            )
            problem = Problem(
                error.status_code, code, str(error.detail), headers=dict(error.headers or {})
            )
        case _:
            problem = internal_problem()
    body = problem.body(face_of(request.url.path), request.state.request_id)
    return JSONResponse(body, status_code=problem.status, headers=problem.headers)


def _invalid(error: RequestValidationError) -> Problem:
    """A parameter of the path or the query that is not what it should be."""
    first = error.errors()[0]
    name = str(first["loc"][-1])[:60]
    return Problem(400, "bad_option", f"{name}: {first['msg']}", param=name)
