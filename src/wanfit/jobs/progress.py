"""How far an attempt is, and how long it may be silent, both by the plan of its job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanfit.jobs.job import Progress

# Shares where a job has no plan: ours, of the demo's seconds, rounded.
UNPLANNED: Mapping[str, float] = {"text": 1.0, "image": 1.0, "denoise": 20.0, "decode": 4.0}
MOST_PERCENT = 99.0  # until the files are kept
SILENT_TIMES = 10.0  # ours: a step may take so many times what the plan says


class Track:
    """Follows one attempt through its stages."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        planned = {stage["stage"]: float(stage["elapsed_s"]) for stage in plan.get("stages", ())}
        self._planned_s = planned
        self._shares = planned if sum(planned.values()) > 0 else UNPLANNED
        self._steps: int | None = None
        self._now = Progress(0.0)

    @property
    def now(self) -> Progress:
        return self._now

    def begin(self, stage: str, steps: int | None) -> None:
        self._steps = steps
        self._move(stage, 0.0, None, steps)

    def step(self, stage: str, step: int, steps: int) -> None:
        self._steps = steps
        self._move(stage, step / max(1, steps), step, steps)

    def keep(self) -> None:
        """The clip is made, and its files are being put away."""
        self._now = Progress(MOST_PERCENT, "keep")

    def patience_s(self, least_s: float) -> float:
        """For how long no news is no hang."""
        stage = self._now.stage
        if stage is None:
            return least_s
        expected_s = self._planned_s.get(stage, 0.0) / max(1, self._steps or 1)
        return max(least_s, SILENT_TIMES * expected_s)

    def _move(self, stage: str, part: float, step: int | None, steps: int | None) -> None:
        before = 0.0
        for name, share in self._shares.items():
            if name == stage:
                break
            before += share
        done = before + part * self._shares.get(stage, 0.0)
        percent = min(MOST_PERCENT, 100 * done / sum(self._shares.values()))
        # Never backwards: a clip that is tried again with less memory begins its stages anew.
        self._now = Progress(max(self._now.percent, round(percent, 2)), stage, step, steps)
