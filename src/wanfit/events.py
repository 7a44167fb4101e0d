"""What a running generation tells its caller.

The pipeline is a generator of these. Progress, cancellation, metering and writing belong to
whoever drives it: the pipeline knows neither a terminal nor a file. Nothing here imports torch.

For one clip the order is: StageBegan, then its StepDone (if it counts steps), for each of the
stages in the order of `Stage`; FramesReady only while "decode" runs; Preview only when asked for,
before the StepDone of its step; WeightsMoved at the end of "text" and "denoise"; Notice at any
time. "image" is left out when there is no image.

Dims: F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Stage = Literal["text", "image", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class StageBegan:
    """A stage starts now, and the one before it is over."""

    stage: Stage
    steps: int | None  # how many StepDone will follow; None: not known


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step of a stage is done."""

    stage: Stage
    step: int  # counts from 1
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class FramesReady:
    """The next frames of the clip, in order. Arrays have no single truth, so no equality."""

    frames: npt.NDArray[np.uint8]  # [F, H, W, 3], RGB


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """About what the middle of the clip will look like, at the size of the latents."""

    step: int  # of "denoise", counted from 1
    steps: int
    frame: npt.NDArray[np.uint8]  # [H, W, 3], RGB


@dataclass(frozen=True, slots=True)
class Notice:
    """One line that a person should see, such as the words that a model does not know."""

    message: str


@dataclass(frozen=True, slots=True)
class WeightsMoved:
    """How the weights of a stage came to the device; the last event of a stage that has any."""

    stage: Stage
    forwards: int  # passes through a whole network
    waited_s: float  # that computing stood still for weights, all forwards together
    streamed_bytes: int  # that went through slots
    resident_bytes: int  # that stayed on the device
    registered_bytes: int  # of mapped files, held by CUDA when the stage ended
    first_ready_s: float | None  # time.perf_counter() when the first unit was on the device


Event = StageBegan | StepDone | Preview | FramesReady | Notice | WeightsMoved
