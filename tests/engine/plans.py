"""Plans by hand, so that a test chooses what lies where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import network_layouts
from wanfit.engine.weights.networks import on_meta
from wanfit.plan.plan import Cuts, NetworkName, Placement, Plan, Precision, Ring, Streaming, Where
from wanfit.request import ResolvedRequest
from wanfit.specs import ModelSpec

SMALL_RING = Ring(num_pieces=3, piece_bytes=4096, num_readers=2, direct=False)


def placements(spec: ModelSpec, where: Where | Mapping[str, Where]) -> dict[NetworkName, Placement]:
    """Every unit in one place, or each where the mapping says; what it leaves out is mapped."""
    found: dict[NetworkName, Placement] = {}
    for name in network_names(spec):
        units = network_layouts(on_meta(spec, name), "bf16")
        at: dict[str, Where] = (
            dict.fromkeys(units, where) if isinstance(where, str) else dict(where)
        )
        found[name] = Placement(
            resident=frozenset(unit for unit, place in at.items() if place == "resident"),
            registered=frozenset(unit for unit, place in at.items() if place == "registered"),
        )
    return found


def slot_bytes(spec: ModelSpec, precision: Precision) -> int:
    """The largest unit that can stream."""
    return max(
        layout.num_bytes
        for name in network_names(spec)
        for unit, layout in network_layouts(on_meta(spec, name), precision).items()
        if unit not in ("rest", "token_embed")
    )


def hand_made_plan(  # noqa: PLR0913  one for each thing that a plan decides
    request: ResolvedRequest,
    *,
    where: Where | Mapping[str, Where] = "resident",
    precision: Precision = "fp32",
    num_slots: int = 2,
    ring: Ring = SMALL_RING,
    rows: int = 8192,
    heads: int | None = None,
    vae_tile_px: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Plan:
    """A plan without expectations: nothing is predicted, no budget is set."""
    spec = request.spec
    streaming = Streaming(placements(spec, where), num_slots, slot_bytes(spec, precision))
    return Plan(
        request=request,
        device=device,
        precision=precision,
        vram_budget_bytes=0,
        ram_budget_bytes=0,
        text=streaming,
        denoise=streaming,
        ring=ring,
        cuts=Cuts(rows, heads or spec.dit.num_heads, vae_tile_px),
        stages=(),
        notes=(),
    )
