"""A job as plain values: what all faces tell, and our own way to tell it.

Left out: what RunPod's and OpenAI's clients expect, which their faces make of the same job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wanfit.jobs.job import Job, Outlook
from wanfit.outputs import Variant
from wanfit.serve.links import Links

LINKED: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")


@dataclass(frozen=True, slots=True)
class Seen:
    """A job with what is known beside its row at the moment of asking."""

    job: Job
    outlook: Outlook
    urls: Mapping[Variant, str]  # of what can be fetched


def seen(job: Job, outlook: Outlook, links: Links, base_url: str) -> Seen:
    """A job as it may be told to its owner."""
    urls = {variant: links.to(job, base_url, variant) for variant in LINKED}
    return Seen(job, outlook, {name: url for name, url in urls.items() if url is not None})


def job_json(view: Seen) -> dict[str, Any]:
    """Our own shape. Times are ISO 8601 in UTC, and Unix seconds beside them where one counts."""
    job = view.job
    return {
        "id": job.id,
        "state": job.state,
        "percent": round(job.percent, 2),
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "attempts": job.attempts,
        "cancel_requested": job.cancel_requested,
        "created": iso(job.created_s),
        "started": iso(job.started_s),
        "ended": iso(job.ended_s),
        "queue": queue_json(view.outlook),
        "request": dict(job.request),
        "has_image": job.has_image,
        "error": error_json(job),
        "video": None if job.result is None else video_json(view),
        "output_gone": job.output_gone,
        "cached": job.cached,
        "report": report_json(job),
        "extra": {name: value for name, value in job.extra.items() if name in ("remixed_from",)},
    }


def queue_json(outlook: Outlook) -> dict[str, Any]:
    """Where a job stands, by the planner: in every status of every face."""
    return {
        "position": outlook.position,
        "expected_start": iso(outlook.starts_s),
        "expected_finish": iso(outlook.ends_s),
    }


def error_json(job: Job) -> dict[str, Any] | None:
    """Why there is no clip: of a failed job, and of one that was cancelled or came too late."""
    if job.error is not None:
        plan = {} if job.error.plan is None else {"plan": dict(job.error.plan)}
        return {
            "code": job.error.code, "message": job.error.message, "hint": job.error.hint, **plan,
        }  # fmt: skip
    if job.state == "cancelled":
        return {"code": "cancelled", "message": "The job was cancelled", "hint": ""}
    if job.state == "expired":
        return {
            "code": "expired",
            "message": "The job waited past its deadline",
            "hint": "Give it more time, or ask when fewer jobs wait",
        }
    return None


def video_json(view: Seen) -> dict[str, Any]:
    """The finished clip."""
    result = view.job.result
    assert result is not None
    return {
        "urls": dict(view.urls),
        "bytes": result.num_bytes,
        "sha256": result.sha256,
        "content_type": result.content_type,
        "width": result.width,
        "height": result.height,
        "num_frames": result.num_frames,
        "fps": result.fps,
    }


def report_json(job: Job) -> dict[str, Any] | None:
    """What it cost. Paths of this machine are nobody else's business."""
    if job.report is None:
        return None
    hidden = ("output", "weights", "contact_sheet")
    return {name: value for name, value in job.report.items() if name not in hidden}


def iso(moment_s: float | None) -> str | None:
    """A Unix time as people and programs read it."""
    if moment_s is None:
        return None
    return datetime.fromtimestamp(moment_s, UTC).isoformat(timespec="milliseconds")
