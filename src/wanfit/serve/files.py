"""A kept file over HTTP: whole, or the range that a player asks for.

A file never changes under its address, so its checksum is its ETag and browsers may keep it for
ever. RFC 9110 for ranges and conditions; of several ranges at once none is served, the whole is,
as it allows.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from wanfit.jobs.job import Job
from wanfit.outputs import Body, KeptFile, OutputStore, Variant
from wanfit.serve.desk import Desk
from wanfit.serve.links import file_name
from wanfit.serve.problems import Problem

_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def kept_file(job: Job, variant: Variant) -> KeptFile:
    """What is known of a file of a job. Raises Problem for one that is not there (any more)."""
    if job.state != "completed" or job.result is None:
        raise Problem(
            404, "not_completed", f"Job {job.id} is {job.state}, and has no {variant} yet"
            if not job.is_final else f"Job {job.id} is {job.state}, and has no {variant}",
        )  # fmt: skip
    if job.output_gone:
        raise Problem(410, "output_gone", f"The files of job {job.id} were deleted since")
    file = job.result.files.get(variant)
    if file is None:
        raise Problem(404, "no_such_variant", f"Job {job.id} has no {variant}")
    return file


async def send_file(
    request: Request, desk: Desk, outputs: OutputStore, job: Job, variant: Variant
) -> Response:
    """The answer to a GET or HEAD for a file of a job. Raises Problem, NotKept, StoreFailed."""
    file = kept_file(job, variant)
    assert job.result is not None
    etag = f'"{file.sha256}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{file_name(job, variant)}"',
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    span = _span(request, etag, file.num_bytes)
    status = 200
    if span is not None:
        status = 206
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{file.num_bytes}"
    start, stop = (0, file.num_bytes) if span is None else (span.start, span.stop)
    headers["content-length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=file.content_type)
    body = await desk.read_file(outputs.open, job.result.key, start, stop, variant)
    return StreamingResponse(
        _pieces(desk, body), status_code=status, headers=headers, media_type=file.content_type
    )


async def _pieces(desk: Desk, body: Body) -> AsyncIterator[bytes]:
    """A piece at a time, each read in a thread; closed when the client is gone too."""
    try:
        while (piece := await desk.read_file(next, body.pieces, b"")) != b"":
            yield piece
    finally:
        body.close()


def _matches(given: str | None, etag: str) -> bool:
    """If-None-Match: a list of tags, weak ones too, or a star."""
    if given is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in given.split(",")]
    return etag in tags or "*" in tags


def _span(request: Request, etag: str, num_bytes: int) -> Span | None:
    """The range that was asked for; None: the whole. Raises Problem for one beyond the end."""
    given = request.headers.get("range")
    if given is None:
        return None
    condition = request.headers.get("if-range")
    if condition is not None and condition.strip() != etag:
        return None
    found = _RANGE.fullmatch(given.strip())
    if found is None or found[1] == found[2] == "":
        return None  # of a form that we need not know, or several
    if found[1] == "":  # the last so many bytes
        span = Span(max(0, num_bytes - int(found[2])), num_bytes)
    else:
        start = int(found[1])
        span = Span(start, min(int(found[2]) + 1, num_bytes) if found[2] else num_bytes)
        if found[2] and int(found[2]) < start:
            return None  # RFC 9110 14.1.1: invalid, so as if there were none
    if span.start >= span.stop:
        raise Problem(
            416, "bad_range", f"The file has {num_bytes} bytes",
            headers={"content-range": f"bytes */{num_bytes}"},
        )  # fmt: skip
    return span
