"""What a webhook is told: what its client would have heard by asking for the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanfit.jobs.job import Job, Notice, Outlook
from wanfit.serve.links import Links
from wanfit.serve.runpod_view import status_json
from wanfit.serve.views import iso, job_json, seen


def word_notice(
    job: Job, outlook: Outlook, links: Links, base_url: str, notice: Notice
) -> Mapping[str, Any]:
    """RunPod's clients get RunPod's status; others an event as Standard Webhooks advises."""
    view = seen(job, outlook, links, base_url)
    if job.face == "runpod":
        return status_json(view, job.id)
    return {
        "type": f"job.{notice.state}",
        "timestamp": iso(notice.created_s),
        "data": job_json(view),
    }
