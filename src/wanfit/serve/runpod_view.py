"""A job as RunPod tells of one; `queue` is ours."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from wanfit.jobs.job import Job
from wanfit.outputs import Kept, OutputStore
from wanfit.serve.hall import Hall
from wanfit.serve.links import file_name
from wanfit.serve.views import Seen, error_json, queue_json, report_json

MAX_BASE64_BYTES = 7_000_000  # of a clip: base64 makes 4/3 of it, and RunPod's answers end at 10 MB
STATUSES: Mapping[str, str] = {
    "queued": "IN_QUEUE",
    "running": "IN_PROGRESS",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
    "expired": "TIMED_OUT",
}


def status_json(view: Seen, job_id: str, video_base64: str | None = None) -> dict[str, Any]:
    """A job as RunPod tells of one; `queue` is ours. Also what its webhook gets."""
    job = view.job
    now_s = time.time()
    told: dict[str, Any] = {
        "id": job_id,
        "status": status_of(job),
        "queue": queue_json(view.outlook),
    }
    if job.started_s is not None:
        told["delayTime"] = _span_ms(job.created_s, job.started_s)
        told["executionTime"] = _span_ms(job.started_s, job.ended_s or now_s)
    elif job.ended_s is not None:
        told["delayTime"] = _span_ms(job.created_s, job.ended_s)
        told["executionTime"] = 0
    if job.attempts > 1:
        told["retries"] = job.attempts - 1
    if job.state == "completed":
        video = (
            {"video_url": view.urls.get("video")} if video_base64 is None
            else {"video_base64": video_base64}
        )  # fmt: skip
        told["output"] = output_json(job, job_id, video)
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


def output_json(job: Job, job_id: str, video: Mapping[str, str | None]) -> dict[str, Any]:
    """The output of a completed job. `video`: the clip as `video_url` or as `video_base64`."""
    result = job.result
    assert result is not None
    return {
        "request_id": job_id,
        "status": "completed",
        **video,
        "filename": file_name(job, "video"),
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


async def base64_of(hall: Hall, job: Job) -> str | None:
    """The clip itself, where it was asked for and is small enough to be sent in JSON."""
    result = job.result
    if not job.extra.get("return_video"):
        return None
    if result is None or job.output_gone or result.num_bytes > MAX_BASE64_BYTES:
        return None

    return await hall.desk.read_file(read_base64, hall.outputs, result)


def read_base64(outputs: OutputStore, result: Kept) -> str:
    """A kept clip as base64. Raises NotKept, StoreFailed."""
    return base64.b64encode(b"".join(outputs.open(result.key).pieces)).decode()


def status_of(job: Job) -> str:
    """RunPod's word; an attempt that took too long is no failure of the work."""
    if job.state == "failed" and job.error is not None and job.error.code == "timed_out":
        return "TIMED_OUT"
    return STATUSES[job.state]


def _span_ms(begin_s: float, end_s: float) -> int:
    """A clock may jump back; no time is negative."""
    return max(0, round(1000 * (end_s - begin_s)))
