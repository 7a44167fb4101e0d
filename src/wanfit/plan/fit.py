"""Fits one request into one budget: where each block lies, how work is cut, at the least time.

`fit` gives a Plan, or the Shortfall that stands in its way. It is arithmetic, so that the planner
can ask it many times (would fewer frames fit? fp8? more memory?) within milliseconds.

How it chooses. The VAE takes the fastest tiles that fit. The transformer takes two slots and, where
copies do not hide behind compute, as many resident blocks as the GPU has room for, spread evenly;
of the blocks that stream, those that RAM has room for are registered, also spread evenly, and the
rest are mapped. Where all of an expert fits the page cache, leaving everything mapped may be faster
than registering a part and reading the rest from disk each time: both are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wanfit.events import Stage
from wanfit.plan import bytes as costs
from wanfit.plan import seconds, vae
from wanfit.plan.case import (
    NUM_SLOTS,
    ROWS,
    Case,
    Shortfall,
    active_experts,
    cuts_of,
    denoise_device,
    denoise_slot_bytes,
    device_total,
    dit_of,
    host_extra,
    host_parts,
    least_denoise,
    shortfall,
    slot_bytes,
    text_device,
    with_overhead,
)
from wanfit.plan.plan import Cuts, Limit, Placement, Plan, Ring, StageCost, Streaming
from wanfit.plan.seconds import Rates, Traffic
from wanfit.plan.weights import ONCE_UNITS, REST, TOKEN_EMBED, block_names, dit_units, umt5_units

MOST_SLOTS = 4  # ours: more would hold blocks that nobody waits for
PIECE_BYTES = 16 << 20  # ours: large enough for the link's and the disk's full rate
RING_PIECES = (8, 4, 2)
MOST_READERS = 8
# Kept free of registered pages, which nobody can reclaim: past the limit the kernel kills us.
REGISTER_MARGIN_BYTES = 1 << 30
PAGE_CACHE_SHARE = 0.9  # ours: of the RAM left over; the kernel caches more than our files


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How one expert's blocks are dealt out; the same counts for each expert."""

    resident: int
    registered: int
    mapped: int


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to run the denoise stage."""

    blocks: _Blocks
    cuts: Cuts
    ring: Ring
    num_slots: int
    registered_bytes: int  # of all experts
    seconds: float
    limit: Limit


def fit(case: Case) -> Plan | Shortfall:
    """The fastest plan that keeps to the budgets, or what stands in the way of any."""
    found: Plan | Shortfall | None = None
    for ring in _rings(case):
        found = _fit_with_ring(case, ring)
        if isinstance(found, Plan) or found.memory == "GPU":
            return found
    assert found is not None, "there is a ring to try"
    return found


def _rings(case: Case) -> Iterator[Ring]:
    """Rings to try, the best first. A small model takes small pieces."""
    spec, precision = case.shape.request.spec, case.shape.precision
    umt5 = umt5_units(spec.umt5, precision)
    largest = max(slot_bytes(umt5), slot_bytes(dit_units(spec.dit, precision)))
    piece = min(PIECE_BYTES, -(-largest // 4096) * 4096)  # whole pages, for direct reads
    readers = max(1, min(MOST_READERS, case.machine.num_cores // 2))
    for pieces in RING_PIECES:
        yield Ring(pieces, piece, min(readers, pieces), direct=False)


def _fit_with_ring(case: Case, ring: Ring) -> Plan | Shortfall:
    tile = _choose_tile(case, ring)
    if isinstance(tile, Shortfall):
        return tile
    least: dict[Stage, dict[str, int]] = {"text": text_device(case), "denoise": least_denoise(case)}
    for stage, device in least.items():
        short = shortfall(case, ring, stage, device, host_extra(case, stage, tile.px))
        if short is not None:
            return short
    return _assemble(case, min(_choices(case, ring, tile.px), key=_preference))


# --- the VAE's tiles ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tile:
    px: int | None


def _choose_tile(case: Case, ring: Ring) -> _Tile | Shortfall:
    """The fastest tiles with which both ends of the VAE fit: the largest; whole frames at best."""
    whole = _vae_shortfall(case, ring, None)
    request = case.shape.request
    sizes = vae.tile_sizes(request.spec.vae, request.width, request.height)
    if whole is None:
        return _Tile(None)
    # Tiles keep the clip on the host, so they are no help where that is short.
    if not sizes or (whole.memory == "host" and case.device == "cuda"):
        return whole
    least = _vae_shortfall(case, ring, sizes[-1])
    if least is not None:
        return least
    return _Tile(next(tile for tile in sizes if _vae_shortfall(case, ring, tile) is None))


def _vae_shortfall(case: Case, ring: Ring, tile_px: int | None) -> Shortfall | None:
    shape = case.shape
    if shape.with_image:
        device = costs.image_device(shape, tile_px)
        short = shortfall(case, ring, "image", device, host_extra(case, "image", tile_px))
        if short is not None:
            return short
    device = costs.decode_device(shape, tile_px)
    return shortfall(case, ring, "decode", device, host_extra(case, "decode", tile_px))


# --- the transformer ---------------------------------------------------------------------------


def _choices(case: Case, ring: Ring, tile_px: int | None) -> Iterator[_Choice]:
    """The ways to run the denoise stage that keep to the budgets."""
    for rows, register in itertools.product(ROWS, (True, False)):
        cuts = cuts_of(case, rows, tile_px)
        if _most_resident(case, ring, cuts) < 0 or (register and not _can_register(case)):
            continue
        yield _choice(case, ring, cuts, register=register)


def _preference(choice: _Choice) -> tuple[float, int, int, int]:
    """Fast first; then large kernels, little that is read again and again, and little GPU memory.

    Rounded to the millisecond, so that sums of the same terms in another order do not decide.
    """
    blocks = choice.blocks
    return round(choice.seconds, 3), -choice.cuts.rows, blocks.mapped, blocks.resident


def _can_register(case: Case) -> bool:
    return case.device == "cuda" and case.as_stored


def _most_resident(case: Case, ring: Ring, cuts: Cuts) -> int:
    """Blocks per expert that the device has room for beside all else; below 0: not even that."""
    num_blocks, size = case.shape.request.spec.dit.num_blocks, dit_of(case)["blocks.0"]
    least = denoise_device(case, cuts, 0, NUM_SLOTS)
    if case.device == "cpu":
        whole = denoise_device(case, cuts, num_blocks, NUM_SLOTS)
        for count, device in ((num_blocks, whole), (0, least)):
            host = host_parts(case, ring, 0, host_extra(case, "denoise", None), device)
            if sum(host.values()) <= case.ram_bytes:
                return count
        return -1
    spare = case.vram_bytes - device_total(case, least)
    if spare < 0:
        return -1
    # The allocator's slack is that of the activations, which blocks do not change.
    count = spare // (size * len(active_experts(case)))
    if count < num_blocks:
        # All blocks, in smaller slots: only embedders pass through them then.
        whole = denoise_device(case, cuts, num_blocks, NUM_SLOTS)
        return num_blocks if device_total(case, whole) <= case.vram_bytes else int(count)
    return num_blocks


def _choice(case: Case, ring: Ring, cuts: Cuts, *, register: bool) -> _Choice:
    """Deals the blocks out: streamed only while copies hide, else as many resident as fit."""
    num_blocks = case.shape.request.spec.dit.num_blocks
    most = _most_resident(case, ring, cuts)
    resident = most if case.device == "cpu" else 0
    while True:
        blocks, dealt_ring = _deal(case, ring, cuts, resident, register=register)
        rates = seconds.rates_of(case.machine, case.shape, case.device, dealt_ring)
        compute_s = seconds.forward_compute_s(case.shape, rates)
        traffic = _traffic(case, blocks)
        if resident == most or seconds.hides(compute_s, traffic, rates):
            break
        resident = most
    each_s, limit = seconds.forward_s(compute_s, traffic, rates)
    num_slots = NUM_SLOTS
    if 0 < resident < num_blocks or limit != "compute":
        num_slots = _spare_slots(case, cuts, resident)
    once = sum(dit_of(case)[unit] for unit in ONCE_UNITS) * len(active_experts(case))
    forwards = sum(seconds.forwards_of(case.shape).values())
    fill_s = (once + dit_of(case)["blocks.0"]) / min(rates.link, rates.ring)
    return _Choice(
        blocks=blocks,
        cuts=cuts,
        ring=dealt_ring,
        num_slots=num_slots,
        registered_bytes=blocks.registered * dit_of(case)["blocks.0"] * len(active_experts(case)),
        seconds=forwards * each_s + fill_s,
        limit=limit,
    )


def _spare_slots(case: Case, cuts: Cuts, resident: int) -> int:
    """Slots that what is left has room for, up to MOST_SLOTS: they even out the copies."""
    if case.device == "cpu":
        return NUM_SLOTS
    counts = range(MOST_SLOTS, NUM_SLOTS, -1)
    devices = ((count, denoise_device(case, cuts, resident, count)) for count in counts)
    fitting = (count for count, parts in devices if device_total(case, parts) <= case.vram_bytes)
    return next(fitting, NUM_SLOTS)


def _deal(
    case: Case, ring: Ring, cuts: Cuts, resident: int, *, register: bool
) -> tuple[_Blocks, Ring]:
    """How many blocks per expert go where, and whether the ring reads around the page cache."""
    num_blocks, size = case.shape.request.spec.dit.num_blocks, dit_of(case)["blocks.0"]
    streamed = num_blocks - resident
    needed = _host_needed(case, ring, cuts, resident)
    registered = 0
    if register:
        room = case.ram_bytes - needed - REGISTER_MARGIN_BYTES
        if case.machine.pinned_limit_bytes is not None:
            room = min(room, case.machine.pinned_limit_bytes - ring.num_bytes)
        registered = min(streamed, max(0, room // (size * len(active_experts(case)))))
    mapped = streamed - registered
    # One expert runs at a time, so the page cache has to hold one expert's mapped blocks.
    page_cache = case.ram_bytes - needed - registered * size * len(active_experts(case))
    direct = mapped * size * case.file_bytes_per_byte > PAGE_CACHE_SHARE * page_cache
    dealt = Ring(ring.num_pieces, ring.piece_bytes, ring.num_readers, direct=mapped > 0 and direct)
    return _Blocks(resident, registered, mapped), dealt


def _host_needed(case: Case, ring: Ring, cuts: Cuts, resident: int) -> int:
    """The most that any stage takes on the host, registered pages aside."""
    shape, tile = case.shape, cuts.vae_tile_px
    devices: dict[Stage, Mapping[str, int]] = {
        "text": text_device(case),
        "denoise": denoise_device(case, cuts, resident, NUM_SLOTS),
        "decode": costs.decode_device(shape, tile),
    }
    if shape.with_image:
        devices["image"] = costs.image_device(shape, tile)
    return max(
        sum(host_parts(case, ring, 0, host_extra(case, stage, tile), device).values())
        for stage, device in devices.items()
    )


def _traffic(case: Case, blocks: _Blocks) -> Traffic:
    size = dit_of(case)["blocks.0"]
    return Traffic(
        streamed=(blocks.registered + blocks.mapped) * size,
        mapped=int(blocks.mapped * size * case.file_bytes_per_byte),
    )


# --- the plan ----------------------------------------------------------------------------------


def _assemble(case: Case, choice: _Choice) -> Plan:
    shape, cuts = case.shape, choice.cuts
    rates = seconds.rates_of(case.machine, shape, case.device, choice.ring)
    resident = choice.blocks.resident

    stages = [_stage(case, choice, "text", text_device(case), *_text_s(case, rates))]
    if shape.with_image:
        device = costs.image_device(shape, cuts.vae_tile_px)
        taken = seconds.encode_s(shape, cuts.vae_tile_px, rates)
        stages.append(_stage(case, choice, "image", device, taken, "compute"))
    device = denoise_device(case, cuts, resident, choice.num_slots)
    stages.append(_stage(case, choice, "denoise", device, choice.seconds, choice.limit))
    device = costs.decode_device(shape, cuts.vae_tile_px)
    taken = seconds.decode_s(shape, cuts.vae_tile_px, rates)
    stages.append(_stage(case, choice, "decode", device, taken, "compute"))

    active = active_experts(case)
    idle = Placement(resident=frozenset((REST,)))
    dealt = _placement(shape.request.spec.dit.num_blocks, choice.blocks)
    return Plan(
        request=shape.request,
        device=case.device,
        precision=shape.precision,
        vram_budget_bytes=case.vram_bytes if case.device == "cuda" else 0,
        ram_budget_bytes=case.ram_bytes,
        text=Streaming(
            {"umt5": Placement(resident=frozenset((REST,)))},
            NUM_SLOTS,
            slot_bytes(umt5_units(shape.request.spec.umt5, shape.precision)),
        ),
        denoise=Streaming(
            {expert: dealt if expert in active else idle for expert in shape.request.spec.experts},
            choice.num_slots,
            denoise_slot_bytes(case, resident),
        ),
        ring=choice.ring,
        cuts=cuts,
        stages=tuple(stages),
        notes=(),
    )


def _stage(
    case: Case,
    choice: _Choice,
    stage: Stage,
    device: Mapping[str, int],
    taken_s: float,
    limit: Limit,
) -> StageCost:
    extra = host_extra(case, stage, choice.cuts.vae_tile_px)
    host = host_parts(case, choice.ring, choice.registered_bytes, extra, device)
    on_device = with_overhead(case, device) if case.device == "cuda" else {}
    return StageCost(stage, on_device, host, taken_s, limit)


def _text_s(case: Case, rates: Rates) -> tuple[float, Limit]:
    units = umt5_units(case.shape.request.spec.umt5, case.shape.precision)
    moved = sum(size for unit, size in units.items() if unit != TOKEN_EMBED)
    traffic = Traffic(moved, int(moved * case.file_bytes_per_byte))
    return seconds.forward_s(seconds.text_compute_s(case.shape, rates), traffic, rates)


def _placement(num_blocks: int, blocks: _Blocks) -> Placement:
    names = block_names(num_blocks)
    resident = set(spread(blocks.resident, num_blocks))
    streamed = [index for index in range(num_blocks) if index not in resident]
    registered = [streamed[i] for i in spread(blocks.registered, len(streamed))]
    return Placement(
        resident=frozenset((REST, *(names[i] for i in resident))),
        registered=frozenset(names[i] for i in registered),
    )


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers below `total`, as evenly as whole numbers allow."""
    return tuple(math.floor(i * total / count) for i in range(count))
