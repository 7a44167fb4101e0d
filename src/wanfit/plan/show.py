"""A plan for people and for programs: tables, and plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wanfit.plan.amounts import show_bytes
from wanfit.plan.offers import CardOffer
from wanfit.plan.plan import Placement, Plan, StageCost, Streaming

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_BYTES = 1 << 20  # ours: smaller parts are left out of tables; they count in the sums


def plan_json(plan: Plan) -> dict[str, Any]:
    """Plain values; every number's unit is in its name."""
    return {
        "fits": True,
        "settings": plan.request.describe(),
        "device": plan.device,
        "precision": plan.precision,
        "vram_budget_bytes": plan.vram_budget_bytes,
        "ram_budget_bytes": plan.ram_budget_bytes,
        "device_peak_bytes": plan.device_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "elapsed_s": round(plan.seconds, 3),
        "text": _streaming_json(plan.text),
        "denoise": _streaming_json(plan.denoise),
        "ring": {
            "num_pieces": plan.ring.num_pieces,
            "piece_bytes": plan.ring.piece_bytes,
            "num_readers": plan.ring.num_readers,
            "direct": plan.ring.direct,
        },
        "cuts": {
            "rows": plan.cuts.rows,
            "heads": plan.cuts.heads,
            "vae_tile_px": plan.cuts.vae_tile_px,
        },
        "stages": [
            {
                "stage": stage.stage,
                "device_bytes": dict(stage.device_bytes),
                "host_bytes": dict(stage.host_bytes),
                "device_peak_bytes": sum(stage.device_bytes.values()),
                "host_peak_bytes": sum(stage.host_bytes.values()),
                "elapsed_s": round(stage.seconds, 3),
                "limit": stage.limit,
            }
            for stage in plan.stages
        ],
        "notes": list(plan.notes),
    }


def plan_title(plan: Plan, machine_name: str) -> str:
    """One line: what, where, and that it fits."""
    request = plan.request
    return (
        f"{request.spec.name} {request.width}x{request.height}, {request.num_frames} frames,"
        f" {request.num_inference_steps} steps, {plan.precision} on {machine_name}: fits,"
        f" {show_seconds(plan.seconds)}"
    )


def plan_table(plan: Plan) -> Table:
    """For each stage its peaks against the budgets, time and limit, then its parts."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("stage", "", "GPU", "host", "time", "limited by"):
        table.add_column(column, justify="right" if column in ("GPU", "host") else "left")
    for stage in plan.stages:
        peaks = [show_bytes(sum(parts.values())) if parts else "" for parts in _parts(stage)]
        table.add_row(stage.stage, "peak", *peaks, show_seconds(stage.seconds), stage.limit)
        for side, parts in enumerate(_parts(stage)):
            for name, size in parts.items():
                if size >= SHOWN_BYTES:
                    table.add_row("", name, *(["", show_bytes(size)][:: -1 if side == 0 else 1]))
        table.add_section()
    on_gpu = plan.device == "cuda"
    peak = show_bytes(plan.device_peak_bytes) if on_gpu else ""
    table.add_row("all", "peak", peak, show_bytes(plan.host_peak_bytes), show_seconds(plan.seconds))
    budget = show_bytes(plan.vram_budget_bytes) if on_gpu else ""
    table.add_row("", "budget", budget, show_bytes(plan.ram_budget_bytes))
    return table


def plan_lines(plan: Plan) -> list[str]:
    """Where each network's weights lie, how work is cut, and the notes."""
    lines = [
        f"{network}: {_whereabouts(placement, _num_blocks(plan, network))}"
        for streaming in (plan.text, plan.denoise)
        for network, placement in streaming.placements.items()
    ]
    place = "the GPU" if plan.device == "cuda" else "the host"
    lines.append(f"vae: whole on {place} while it is used")
    cuts, ring = plan.cuts, plan.ring
    tile = "whole frames" if cuts.vae_tile_px is None else f"tiles of {cuts.vae_tile_px} px"
    lines.append(
        f"cuts: {cuts.rows} tokens and {cuts.heads} heads at a time, VAE on {tile};"
        f" {plan.denoise.num_slots} slots of {show_bytes(plan.denoise.slot_bytes)};"
        f" ring of {ring.num_pieces} x {show_bytes(ring.piece_bytes)}"
        f", readers: {ring.num_readers}" + (", direct" if ring.direct else "")
    )
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def offers_table(offers: list[CardOffer], *, priced: bool) -> Table:
    """One row per card: fits or not and why, peaks, time and cost."""
    from rich import box
    from rich.table import Table

    columns = ["card", "VRAM", "RAM", "fits", "GPU peak", "host peak", "time per clip"]
    table = Table(*columns, *(["cost per clip"] if priced else []), box=box.SIMPLE_HEAD)
    for offer in offers:
        plan = offer.plan
        cells = [offer.card.name, show_bytes(offer.card.vram_bytes), show_bytes(offer.ram_bytes)]
        if plan is None:
            cells += [f"no: {offer.why_not}", *[""] * 3]
        else:
            peaks = (plan.device_peak_bytes, plan.host_peak_bytes)
            cells += ["yes", *(show_bytes(peak) for peak in peaks), show_seconds(plan.seconds)]
        if priced:
            cells.append("" if offer.cost is None else f"{offer.cost:.3f}")
        table.add_row(*cells)
    return table


def offers_json(offers: list[CardOffer]) -> list[dict[str, Any]]:
    """The same as plain values. `cost` is in the price list's currency."""
    return [
        {
            "card": offer.card.name,
            "runpod_id": offer.card.runpod_id,
            "vram_bytes": offer.card.vram_bytes,
            "ram_bytes": offer.ram_bytes,
            "fits": offer.plan is not None,
            "why_not": offer.why_not,
            "device_peak_bytes": offer.plan.device_peak_bytes if offer.plan else None,
            "host_peak_bytes": offer.plan.host_peak_bytes if offer.plan else None,
            "elapsed_s": round(offer.plan.seconds, 3) if offer.plan else None,
            "cost": None if offer.cost is None else round(offer.cost, 6),
        }
        for offer in offers
    ]


def show_seconds(seconds: float) -> str:
    """As people read it: "0.7 s", "95 s", "18 min", "9.7 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def _streaming_json(streaming: Streaming) -> dict[str, Any]:
    return {
        "num_slots": streaming.num_slots,
        "slot_bytes": streaming.slot_bytes,
        "placements": {
            network: {
                "resident": sorted(placement.resident),
                "registered": sorted(placement.registered),
            }
            for network, placement in streaming.placements.items()
        },
    }


def _num_blocks(plan: Plan, network: str) -> int:
    spec = plan.request.spec
    return spec.umt5.num_blocks if network == "umt5" else spec.dit.num_blocks


def _whereabouts(placement: Placement, num_blocks: int) -> str:
    blocks = [f"blocks.{index}" for index in range(num_blocks)]
    where = [placement.of(block) for block in blocks]
    counts = {name: where.count(name) for name in ("resident", "registered", "mapped")}
    named = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{num_blocks} blocks, {named}"


def _parts(stage: StageCost) -> tuple[Mapping[str, int], Mapping[str, int]]:
    return stage.device_bytes, stage.host_bytes
