"""What was made, with which settings, what it cost, and what the plan had expected."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfit.events import WeightsMoved
from wanfit.plan.plan import Plan
from wanfit.plan.show import plan_json

if TYPE_CHECKING:
    from wanfit.engine.meter import StageUse


@dataclass(frozen=True, slots=True)
class Started:
    """How soon it went, in seconds since the process began."""

    call_s: float  # `generate` was called
    first_block_ready_s: float | None  # the first weights of a transformer were on the device
    denoising_s: float | None  # the first step began


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, with which settings, and what it cost."""

    output: Path
    output_bytes: int  # of the file, or of all PNG frames together
    contact_sheet: Path | None
    num_frames: int
    settings: dict[str, Any]  # ResolvedRequest.describe()
    weights: Path
    device: str
    precision: str
    stages: tuple[StageUse, ...]  # measured
    plan: Plan  # expected
    weights_moved: tuple[WeightsMoved, ...]
    retried: bool  # with a tighter plan, since memory had run out
    total_s: float  # from the call to the file on disk, importing torch included
    first_step_s: float | None  # from the call to the end of the first denoising step
    started: Started
    write_s: float  # of the decode stage, spent encoding and writing the file
    notices: tuple[str, ...]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; every measured key ends in its unit."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        fields["output"] = str(self.output)
        fields["weights"] = str(self.weights)
        fields["contact_sheet"] = str(self.contact_sheet) if self.contact_sheet else None
        fields["plan"] = {
            name: value for name, value in plan_json(self.plan).items() if name != "settings"
        }
        for name in ("total_s", "first_step_s", "write_s"):
            fields[name] = _milliseconds(fields[name])
        fields["stages"] = [
            {**asdict(stage), "elapsed_s": _milliseconds(stage.elapsed_s)} for stage in self.stages
        ]
        fields["started"] = {
            name: _milliseconds(since_s) for name, since_s in asdict(self.started).items()
        }
        fields["weights_moved"] = [
            {
                **{name: value for name, value in asdict(moved).items() if name != "first_ready_s"},
                "waited_ms_per_forward": round(1000 * moved.waited_s / moved.forwards, 3),
            }
            for moved in self.weights_moved
        ]
        return fields


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
