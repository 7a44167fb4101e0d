"""What `{"input": {"action": "health"}}` is answered with: what is here, and what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wanfit.doctor import examine
from wanfit.jobs.telemetry import WorkerStatus
from wanfit.worker.settings import WorkerSettings


def health_json(settings: WorkerSettings, workers: Sequence[WorkerStatus]) -> dict[str, Any]:
    """Models with the planner's verdict for this machine, checks, versions, and the GPU process.

    Takes a second, and none of the GPU's memory: torch is asked in no further process.
    """
    findings = examine(settings.server, for_worker=True, with_torch=False)
    states = {one.state for one in workers}
    return {
        "status": "ready" if states & {"idle", "busy", "keeping"} else sorted(states)[0],
        "gpu_process": [
            {
                "state": one.state, "device": one.device, "restarts": one.restarts,
                "last_end": one.last_end, "rss_bytes": one.rss_bytes,
            }
            for one in workers
        ],
        **findings.to_json(with_paths=False),
    }  # fmt: skip
