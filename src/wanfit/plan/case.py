"""One question to the planner, and what each of its stages would hold on the GPU and on the host.

Sums of `weights` and `bytes` for a choice of placement; which choice is best is for `fit` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wanfit.events import Stage
from wanfit.plan import bytes as costs
from wanfit.plan.bytes import Shape
from wanfit.plan.machine import Machine
from wanfit.plan.plan import Cuts, Precision, Ring
from wanfit.plan.seconds import forwards_of
from wanfit.plan.weights import (
    ONCE_UNITS,
    REST,
    TOKEN_EMBED,
    dit_units,
    umt5_units,
)
from wanfit.specs import Expert

Device = Literal["cuda", "cpu"]

NUM_SLOTS = 2  # one computes, one fills
ROWS = (8192, 4096, 2048)  # tokens at a time: fewer cost kernels that fill the GPU less


@dataclass(frozen=True, slots=True)
class Case:
    """One question: this request, in this precision, on this device, within these bytes."""

    shape: Shape
    machine: Machine
    device: Device
    stored: Precision | None  # of the weights on disk; None: as the shape's precision
    vram_bytes: int
    ram_bytes: int

    @property
    def as_stored(self) -> bool:
        """Whether bytes go to the device as they lie on disk, which registering needs."""
        return self.stored in (None, self.shape.precision)

    @property
    def file_bytes_per_byte(self) -> float:
        """Bytes of blocks read per byte that is needed."""
        if self.stored is None or self.as_stored:
            return 1.0
        dit = self.shape.request.spec.dit
        stored, needed = (
            dit_units(dit, precision)["blocks.0"]
            for precision in (self.stored, self.shape.precision)
        )
        return stored / needed


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What does not fit: the least that a stage needs, and what there is for it."""

    stage: Stage
    memory: Literal["GPU", "host"]
    needed_bytes: int
    budget_bytes: int


def device_total(case: Case, parts: Mapping[str, int]) -> int:
    """Bytes that a stage takes on the GPU, given its tensors."""
    return sum(with_overhead(case, parts).values())


def with_overhead(case: Case, parts: Mapping[str, int]) -> dict[str, int]:
    """A stage's tensors and what CUDA and its allocator add to them."""
    if case.device == "cpu":
        return {name: size for name, size in parts.items() if name != "gaps"}
    return {
        "CUDA context": costs.CUDA_CONTEXT_BYTES,
        **{name: size for name, size in parts.items() if size},
        "allocator": costs.ALLOCATOR_BYTES,
    }


def shortfall(
    case: Case, ring: Ring, stage: Stage, device: Mapping[str, int], extra: Mapping[str, int]
) -> Shortfall | None:
    """Which budget a stage passes with nothing registered, if any. `extra` is of `host_extra`."""
    needed = device_total(case, device)
    if case.device == "cuda" and needed > case.vram_bytes:
        return Shortfall(stage, "GPU", needed, case.vram_bytes)
    needed = sum(host_parts(case, ring, 0, extra, device).values())
    if needed > case.ram_bytes:
        return Shortfall(stage, "host", needed, case.ram_bytes)
    return None


def slot_bytes(units: Mapping[str, int]) -> int:
    """Of the largest unit that may pass through a slot."""
    return max(size for unit, size in units.items() if unit not in (REST, TOKEN_EMBED))


def text_device(case: Case) -> dict[str, int]:
    """Tensors of the text stage: UMT5's blocks pass through slots."""
    units = umt5_units(case.shape.request.spec.umt5, case.shape.precision)
    return {
        "resident weights": units[REST],
        "slots": NUM_SLOTS * slot_bytes(units),
        "activations": costs.text_activations(case.shape),
    }


def denoise_device(case: Case, cuts: Cuts, resident: int, num_slots: int) -> dict[str, int]:
    """Tensors of the denoise stage with `resident` blocks of each expert on the device."""
    units = dit_of(case)
    blocks = resident * units["blocks.0"] * len(active_experts(case))
    activations = costs.denoise_activations(case.shape, cuts)
    return {
        "resident weights": units[REST] * len(case.shape.request.spec.experts) + blocks,
        "slots": num_slots * denoise_slot_bytes(case, resident),
        **activations,
        "gaps": int(costs.DENOISE_GAPS * activations["working"]),
    }


def denoise_slot_bytes(case: Case, resident: int) -> int:
    """Of the largest unit that streams: a block, or an embedder where all blocks are resident."""
    units = dit_of(case)
    all_resident = resident == case.shape.request.spec.dit.num_blocks
    largest_once = max(units[unit] for unit in ONCE_UNITS)
    return largest_once if all_resident else max(largest_once, units["blocks.0"])


def least_denoise(case: Case) -> dict[str, int]:
    """Tensors of the denoise stage when everything is cut as small as it goes."""
    return denoise_device(case, cuts_of(case, ROWS[-1], None), 0, NUM_SLOTS)


def cuts_of(case: Case, rows: int, tile_px: int | None) -> Cuts:
    """The cuts of the stages, given those that depend on the budget."""
    shape = case.shape
    heads = costs.heads_at_a_time(shape.request.spec.dit, shape.geometry.num_tokens)
    return Cuts(rows, heads, tile_px)


def dit_of(case: Case) -> Mapping[str, int]:
    """Unit -> bytes of one expert."""
    return dit_units(case.shape.request.spec.dit, case.shape.precision)


def active_experts(case: Case) -> tuple[Expert, ...]:
    """The experts that have a step to do."""
    counts = forwards_of(case.shape)
    return tuple(expert for expert in case.shape.request.spec.experts if counts[expert])


def host_extra(case: Case, stage: Stage, tile_px: int | None) -> dict[str, int]:
    """Host bytes of one stage beside what all stages have."""
    return {
        **_host_tensors(case, stage, tile_px),
        "libraries": costs.libraries_host(case.shape, stage, case.device),
    }


def _host_tensors(case: Case, stage: Stage, tile_px: int | None) -> Mapping[str, int]:
    shape = case.shape
    match stage:
        case "text":
            umt5 = umt5_units(shape.request.spec.umt5, shape.precision)
            return {"token rows": costs.token_rows(shape, umt5[TOKEN_EMBED])}
        case "image":
            return costs.image_host(shape)
        case "denoise":
            return {"noise": shape.latent_bytes}
        case "decode":
            return costs.decode_host(shape, tile_px)


def host_parts(
    case: Case, ring: Ring, registered: int, extra: Mapping[str, int], device: Mapping[str, int]
) -> dict[str, int]:
    """All host bytes of one stage; on the CPU device its tensors lie there too."""
    base = costs.HOST_BASE_CPU_BYTES if case.device == "cpu" else costs.HOST_BASE_CUDA_BYTES
    base = max(base, case.machine.process_bytes)
    parts = {"process": base, "ring": ring.num_bytes, "registered": registered, **extra}
    if case.device == "cpu":
        parts |= {name: parts.get(name, 0) + size for name, size in device.items()}
    return {name: size for name, size in parts.items() if size}
