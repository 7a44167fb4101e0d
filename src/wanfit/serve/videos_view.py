"""A job as OpenAI tells of a video; what is ours comes at the end, where no client looks."""

from __future__ import annotations

import time
from typing import Any

from wanfit.serve.videos_input import seconds_text
from wanfit.serve.views import Seen, error_json, queue_json, report_json
from wanfit.specs import spec_named

POLL_RANGE_MS = (250, 10_000)  # ours: what a poll may cost us, and what a person may wait for
POLLS_PER_JOB = 20  # ours
STATUSES = {
    "queued": "queued",
    "running": "in_progress",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "failed",
    "expired": "failed",
}


def video_json(view: Seen) -> dict[str, Any]:
    """A job as OpenAI tells of a video; what is ours comes at the end, where no client looks."""
    job = view.job
    request = job.request
    fps = spec_named(request["model"]).sampling.fps
    error = error_json(job)
    report = report_json(job) or {}
    return {
        "id": job.id,
        "object": "video",
        "model": request["model"],
        "status": STATUSES[job.state],
        "progress": int(job.percent),
        "created_at": int(job.created_s),
        "completed_at": int(job.ended_s) if job.state == "completed" and job.ended_s else None,
        "expires_at": None,
        "prompt": request["prompt"],
        "size": f"{request['width']}x{request['height']}",
        "seconds": job.extra.get("seconds") or seconds_text(request["num_frames"], fps),
        "remixed_from_video_id": job.extra.get("remixed_from"),
        "error": error and {
            "code": error["code"],
            "message": ". ".join(filter(None, (error["message"], error["hint"]))),
        },
        "url": view.urls.get("video"),
        "seed": request["seed"],
        "num_frames": request["num_frames"],
        "fps": fps,
        "num_inference_steps": request["num_inference_steps"],
        "stage": job.stage,
        "queue": queue_json(view.outlook),
        "inference_time_s": report.get("total_s"),
    }  # fmt: skip


def poll_after_ms(view: Seen) -> int:
    """How long a client should wait between two looks.

    The client keeps the first answer for the whole wait, so it is a share of what is left then.
    """
    ends_s, job = view.outlook.ends_s, view.job
    low, high = POLL_RANGE_MS
    if job.is_final or ends_s is None:
        return low
    left_s = ends_s - time.time()
    return round(min(high, max(low, 1000 * left_s / POLLS_PER_JOB)))
