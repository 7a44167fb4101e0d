"""What goes wrong on the way through HTTP: a status, and a body in the shape of the face.

    own      {"error": {"code", "message", "hint", "request_id", ...}}
    openai   {"error": {"message", "type", "param", "code", ...}}
    runpod   {"status": "FAILED", "error": the own one as a string, ...}: a string, since an object
             there is not taken for an error by RunPod's own clients

Errors of `wanfit.errors` become problems here and nowhere else. What nobody foresaw is a 500 that
says no more than its request id, by which the log has the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from wanfit.errors import (
    BadRequest,
    BadSetting,
    DatabaseBusy,
    DoesNotFit,
    DownloadFailed,
    KeyReused,
    NoRoom,
    NoSuchJob,
    NotKept,
    QueueFull,
    StoreFailed,
    WanfitError,
    WeightsError,
)

log = logging.getLogger("wanfit.serve")

Face = Literal["runpod", "openai", "own"]
ERROR_TYPES: Mapping[int, str] = {  # OpenAI's names for kinds of errors
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str = "",
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.param = param
        self.details = dict(details or {})  # more fields of the error, for programs
        self.headers = dict(headers or {})

    def body(self, face: Face, request_id: str) -> dict[str, Any]:
        """The JSON of the answer, as clients of that face expect it."""
        said = {"code": self.code, "message": self.message, "hint": self.hint}
        if face == "openai":
            message = f"{self.message}. {self.hint}" if self.hint else self.message
            kind = ERROR_TYPES.get(
                self.status, "server_error" if self.status >= 500 else "invalid_request_error"
            )
            error = {"message": message, "type": kind, "param": self.param, "code": self.code}
            return {"error": {**error, **self.details}}
        if face == "runpod":
            text = json.dumps({**said, "request_id": request_id})
            return {"status": "FAILED", "error": text, **self.details}
        param = {} if self.param is None else {"param": self.param}
        return {"error": {**said, "request_id": request_id, **param, **self.details}}


def face_of(path: str) -> Face:
    """Whose shape the errors of a path have."""
    if path.startswith(("/v1/videos", "/v1/models")):
        return "openai"
    return "own" if path.startswith(("/v1/", "/metrics", "/livez", "/readyz")) else "runpod"


def problem_of(error: WanfitError, *, param: str | None = None) -> Problem:
    """The answer to an error that wanfit raises on purpose."""
    details: dict[str, Any] = {}
    headers: dict[str, str] = {}
    match error:
        case BadSetting():  # the operator's, who finds the rest in the log
            log.error("%s", error)
            return Problem(
                503,
                error.code,
                "The server is not set up rightly",
                headers={"x-should-retry": "false"},
            )
        case BadRequest():
            status = 400
        case DoesNotFit(shortage=shortage):
            status = 422
            details = {"shortage": None if shortage is None else asdict(shortage)}
        case NoRoom():
            status, headers = 503, {"retry-after": "30"}
        case WeightsError() | NoSuchJob() | NotKept():  # a model is not to be had here either
            status = 404
        case KeyReused():  # not 409, which OpenAI's client sends again
            status = 422
        case QueueFull():
            status, headers = 429, {"retry-after": "10"}
        case DatabaseBusy():
            status, headers = 503, {"retry-after": "1"}
        case StoreFailed() | DownloadFailed():
            status, headers = 503, {"retry-after": "5"}
        case _:
            status = 500
    return Problem(
        status,
        error.code,
        error.message,
        hint=error.hint,
        param=param,
        details=details,
        headers=headers,
    )


def internal_problem() -> Problem:
    """For what nobody foresaw."""
    return Problem(
        500,
        "internal_error",
        "The server made a mistake",
        hint="Its log has more, under the request id",
    )


def no_such_job(job_id: str) -> Problem:
    """For a job that is not there, and for one that is somebody else's: nobody can tell which."""
    return Problem(404, "no_such_job", f"There is no job {job_id[:100]!r}")
