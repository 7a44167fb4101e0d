"""Request and machine to Plan, or to DoesNotFit with what would fit instead.

Chooses precision and budgets within what the user allows; `fit` does the rest. Every suggestion
that DoesNotFit makes has been planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from wanfit.errors import BadOption, DoesNotFit
from wanfit.plan.amounts import show_bytes
from wanfit.plan.bytes import shape_of
from wanfit.plan.case import Case, Device, Shortfall
from wanfit.plan.fit import fit
from wanfit.plan.machine import Machine
from wanfit.plan.notes import notes_of
from wanfit.plan.plan import Plan, Precision
from wanfit.request import ResolvedRequest

# Ours: of what is free now, left to others: a desktop, a shell, a page table.
VRAM_RESERVE_SHARE, RAM_RESERVE_SHARE = 0.01, 0.03
MOST_SUGGESTIONS = 4
GROW_BYTES = 1 << 29  # suggested memory is a multiple of this, so that it prints exactly
MOST_GROWTHS = 6  # one for each stage and memory that may be short, and a few
STAGE_WORDS = {
    "text": "reading the prompt",
    "image": "encoding the image",
    "denoise": "denoising",
    "decode": "decoding",
}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Something that would fit: what to change, in words, and its plan."""

    text: str
    plan: Plan


def make_plan(
    request: ResolvedRequest,
    machine: Machine,
    *,
    with_image: bool = False,
    weights_precision: Precision | None = None,
    precision: Precision | Literal["auto"] = "auto",
    vram_budget_bytes: int | None = None,
    ram_budget_bytes: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Plan:
    """How `request` runs on `machine`, at the least time within the budgets.

    with_image: whether there is an input image. weights_precision: that of the weights on disk;
    None: whatever the plan runs in. precision: "auto" is bf16 on CUDA, fp32 on the CPU, and fp8
    where the weights are. Budgets: all that this process may hold on the GPU, CUDA's context
    included, and in RAM, page cache aside; None: nearly all that is free.

    Raises DoesNotFit, saying by how much, in which stage, and what would fit; BadOption for a
    device or a precision that cannot be had. Takes milliseconds and imports no torch.
    """
    case = make_case(
        request,
        machine,
        with_image=with_image,
        weights_precision=weights_precision,
        precision=precision,
        vram_budget_bytes=vram_budget_bytes,
        ram_budget_bytes=ram_budget_bytes,
        device=device,
    )
    found = fit(case)
    if isinstance(found, Shortfall):
        raise does_not_fit(case, found)
    return dataclasses.replace(found, notes=notes_of(found, case))


def make_case(
    request: ResolvedRequest,
    machine: Machine,
    *,
    with_image: bool,
    weights_precision: Precision | None,
    precision: Precision | Literal["auto"],
    vram_budget_bytes: int | None,
    ram_budget_bytes: int | None,
    device: Literal["auto", "cpu", "cuda"],
) -> Case:
    """The question to `fit`. Raises BadOption for a device or a precision that cannot be had."""
    chosen = _device(machine, device)
    running = _precision(precision, weights_precision, chosen)
    free_vram = int(machine.vram_free_bytes * (1 - VRAM_RESERVE_SHARE))
    # A budget is for all that the process holds, so what it holds already is not lost to it.
    may_hold = machine.ram_available_bytes + machine.process_bytes
    free_ram = int(may_hold * (1 - RAM_RESERVE_SHARE))
    return Case(
        shape=shape_of(request, running, with_image=with_image),
        machine=machine,
        device=chosen,
        stored=weights_precision,
        vram_bytes=free_vram if vram_budget_bytes is None else vram_budget_bytes,
        ram_bytes=free_ram if ram_budget_bytes is None else ram_budget_bytes,
    )


def does_not_fit(case: Case, short: Shortfall) -> DoesNotFit:
    """The error for a case that `fit` refused; its hint names what would fit."""
    request = case.shape.request
    missing = short.needed_bytes - short.budget_bytes
    where = "of GPU memory" if short.memory == "GPU" else "of RAM"
    offers = [suggestion.text for suggestion in suggestions(case)]
    return DoesNotFit(
        f"{request.spec.name} at {request.width}x{request.height}, {request.num_frames} frames,"
        f" {case.shape.precision} needs {show_bytes(short.needed_bytes)} {where} while"
        f" {STAGE_WORDS[short.stage]}, and {show_bytes(short.budget_bytes)} are there:"
        f" {show_bytes(missing)} too little",
        hint=f"These fit: {'; '.join(offers)}" if offers else "Nothing near this fits here",
    )


def suggestions(case: Case) -> tuple[Suggestion, ...]:
    """Up to four of the nearest things that fit where `case` does not, each planned."""
    found = (_fewer_frames(case), _smaller_size(case), _in_fp8(case), _more_memory(case))
    return tuple(offer for offer in found if offer is not None)[:MOST_SUGGESTIONS]


def _device(machine: Machine, device: Literal["auto", "cpu", "cuda"]) -> Device:
    if device == "cuda" and machine.gpu is None:
        raise BadOption("device is 'cuda', and this machine has no GPU that its driver shows")
    if device == "auto":
        return "cuda" if machine.gpu is not None else "cpu"
    return device


def _precision(
    wanted: Precision | Literal["auto"], stored: Precision | None, device: Device
) -> Precision:
    if wanted == "auto":
        if stored == "fp8":
            return "fp8"
        return "bf16" if device == "cuda" else "fp32"
    if stored == "fp8" and wanted != "fp8":
        raise BadOption(
            f"precision is {wanted!r}, and these weights are fp8, which has lost what it asks for",
            hint="Use --precision fp8, or the weights that these were converted from",
        )
    return wanted


def _asking(case: Case, request: ResolvedRequest) -> Case:
    """The same case for another request."""
    shape = shape_of(request, case.shape.precision, with_image=case.shape.with_image)
    return dataclasses.replace(case, shape=shape)


def _fewer_frames(case: Case) -> Suggestion | None:
    """The longest clip that fits."""
    request = case.shape.request
    stride = request.spec.vae.stride_frames
    low, high = 0, (request.num_frames - 1) // stride  # the answer is below `high`
    best: Plan | None = None
    while low < high:
        middle = (low + high) // 2
        found = fit(_asking(case, dataclasses.replace(request, num_frames=middle * stride + 1)))
        if isinstance(found, Plan):
            best, low = found, middle + 1
        else:
            high = middle
    if best is None:
        return None
    return Suggestion(f"--frames {best.request.num_frames}", best)


def _smaller_size(case: Case) -> Suggestion | None:
    """The largest size that fits: of the presets, else the same shape made smaller."""
    request = case.shape.request
    for width, height in _sizes_below(case):
        found = fit(_asking(case, dataclasses.replace(request, width=width, height=height)))
        if isinstance(found, Plan):
            return Suggestion(f"--size {width}x{height}", found)
    return None


def _sizes_below(case: Case) -> Iterator[tuple[int, int]]:
    request = case.shape.request
    spec, area = request.spec, request.width * request.height
    upright = request.height > request.width
    presets = [size for size in spec.presets if (size[1] > size[0]) == upright]
    for width, height in sorted(presets, key=lambda size: -size[0] * size[1]):
        if width * height < area:
            yield width, height
    grid = spec.grid_px
    for percent in (75, 50, 25):
        width, height = (
            max(grid, side * percent // 100 // grid * grid)
            for side in (request.width, request.height)
        )
        if width * height < area:
            yield width, height


def _in_fp8(case: Case) -> Suggestion | None:
    if case.shape.precision == "fp8":
        return None
    request = case.shape.request
    shape = shape_of(request, "fp8", with_image=case.shape.with_image)
    found = fit(dataclasses.replace(case, shape=shape, stored=None))
    if isinstance(found, Shortfall):
        return None
    return Suggestion("--precision fp8 with weights converted to it (wanfit convert)", found)


def _more_memory(case: Case) -> Suggestion | None:
    """The budgets that would do, found by giving each stage what it lacks."""
    vram, ram = case.vram_bytes, case.ram_bytes
    for _ in range(MOST_GROWTHS):
        found = fit(dataclasses.replace(case, vram_bytes=vram, ram_bytes=ram))
        if isinstance(found, Plan):
            more = []
            if vram > case.vram_bytes:
                more.append(f"{show_bytes(vram)} of GPU memory")
            if ram > case.ram_bytes:
                more.append(f"{show_bytes(ram)} of RAM")
            return Suggestion(" and ".join(more), found)
        needed = -(-found.needed_bytes // GROW_BYTES) * GROW_BYTES
        if found.memory == "GPU":
            vram = max(needed, vram + GROW_BYTES)
        else:
            ram = max(needed, ram + GROW_BYTES)
    return None
