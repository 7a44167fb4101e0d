"""What a plan says: where every weight lies, how the work is cut, what each stage costs.

Plain frozen values. The planner makes them without torch, the engine obeys them, the edges print
them. Bytes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wanfit.events import Stage
from wanfit.request import ResolvedRequest

Precision = Literal["fp32", "bf16", "fp8"]
NetworkName = Literal["umt5", "high_noise", "low_noise", "vae"]
Where = Literal["resident", "registered", "mapped"]
Limit = Literal["compute", "link", "host", "disk"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the units of one network wait between their uses. What is in neither set is mapped.

    resident: on the device. registered: in the file mapping, which CUDA copies from directly.
    mapped: in the file, read through the ring.
    """

    resident: frozenset[str] = frozenset()
    registered: frozenset[str] = frozenset()

    def of(self, unit: str) -> Where:
        if unit in self.resident:
            return "resident"
        return "registered" if unit in self.registered else "mapped"


@dataclass(frozen=True, slots=True)
class Streaming:
    """How the units of one stage reach the device."""

    placements: Mapping[NetworkName, Placement]
    num_slots: int  # buffers on the device that streamed units take turns in; at least 2
    slot_bytes: int  # of one; the largest unit that streams


@dataclass(frozen=True, slots=True)
class Ring:
    """The pinned buffers through which mapped units go, and who fills them."""

    num_pieces: int
    piece_bytes: int
    num_readers: int  # threads
    direct: bool  # read around the page cache, since it could not hold what streams

    @property
    def num_bytes(self) -> int:
        return self.num_pieces * self.piece_bytes


@dataclass(frozen=True, slots=True)
class Cuts:
    """Into what parts work is cut, to hold activations down. No cut changes a result."""

    rows: int  # tokens that a position-wise layer sees at a time
    heads: int  # attention heads at a time; divides the number of heads
    vae_tile_px: int | None  # side of the VAE's tiles; None: whole frames


@dataclass(frozen=True, slots=True)
class StageCost:
    """What the planner expects of one stage. The parts of each sum add up to its peak."""

    stage: Stage
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    seconds: float
    limit: Limit  # what the stage would be faster with more of


@dataclass(frozen=True, slots=True)
class Plan:
    """How one request runs on one machine within one budget."""

    request: ResolvedRequest
    device: Literal["cuda", "cpu"]
    precision: Precision
    vram_budget_bytes: int  # all that this process may hold on the GPU, CUDA's context included
    ram_budget_bytes: int
    text: Streaming
    denoise: Streaming
    ring: Ring
    cuts: Cuts
    stages: tuple[StageCost, ...]
    notes: tuple[str, ...]  # one line each: choices a person should know of, flags explained

    @property
    def device_peak_bytes(self) -> int:
        return max(sum(stage.device_bytes.values()) for stage in self.stages)

    @property
    def host_peak_bytes(self) -> int:
        return max(sum(stage.host_bytes.values()) for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)
