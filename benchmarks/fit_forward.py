"""One transformer forward: weights all on the device, streamed from registered pages, by the ring.

The engine's own networks, streamer and plan are run; only where the weights wait is forced. All
ways run in one process, in turn, and more than once, so that a card that warms up favours none.
A forward is timed on the GPU from the end of the one before it to its own end, so that what happens
between two forwards counts. The first of each turn is left out: it fills the slots.
Left out: text encoder, solver, VAE (benchmarks.fit_clips).
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks.figures import GIB, Figure, note, say
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.dit_rows import RowKernels, Workspace, compiled_kernels
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.layout import PRECISION_DTYPES, TORCH_DTYPES
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.stream import Streamer, StreamUse, Visit
from wanfit.engine.weights.units import Unit, streamed_network
from wanfit.geometry import Geometry, geometry_of
from wanfit.plan.machine import read_machine
from wanfit.plan.plan import Cuts, Placement, Plan, Precision, Ring, Streaming
from wanfit.plan.planner import make_plan
from wanfit.plan.weights import ONCE_UNITS
from wanfit.request import VideoRequest, resolve
from wanfit.specs import T2V_A14B, TEXT_TOKENS, TI2V_5B, ModelSpec

Way = Literal["resident", "registered", "ring", "plan"]
WAYS: tuple[Way, ...] = get_args(Way)
EXPERT: Literal["high_noise"] = "high_noise"
TIMESTEP = 700.0


@dataclass(frozen=True, slots=True)
class ForwardCase:
    """One size of one model, how often it runs, and its bars."""

    name: str
    spec: ModelSpec
    precision: Precision
    width: int
    height: int
    num_frames: int
    ways: tuple[Way, ...]
    rounds: int = 2  # turns of each way
    timed: int = 2  # forwards of a turn that count
    vram_bytes: int | None = None  # for the plan, whose cuts all ways use
    most_ratio: float | None = None  # streamed against resident
    most_reserved_gib: float | None = None  # of the streamed ways


_GB = 1_000_000_000
_STREAMED: tuple[Way, ...] = ("resident", "registered", "ring")
FORWARDS = (
    ForwardCase(
        "A14B 720p81", T2V_A14B, "bf16", 1280, 720, 81, _STREAMED,
        timed=1, vram_bytes=8 * _GB, most_ratio=1.02, most_reserved_gib=7.0,
    ),
    ForwardCase(
        "A14B 480p81", T2V_A14B, "bf16", 832, 480, 81, _STREAMED,
        vram_bytes=8 * _GB, most_ratio=1.03,
    ),
    ForwardCase(
        "A14B 480p81 fp8", T2V_A14B, "fp8", 832, 480, 81, _STREAMED,
        vram_bytes=4 * _GB, most_ratio=1.03, most_reserved_gib=3.5,
    ),
    ForwardCase(
        "5B 704p121", TI2V_5B, "bf16", 1280, 704, 121, _STREAMED,
        timed=3, vram_bytes=8 * _GB, most_reserved_gib=4.5,
    ),
    ForwardCase(
        "5B 704p25, 8 GB", TI2V_5B, "bf16", 1280, 704, 25, ("resident", "plan"),
        rounds=3, timed=8, vram_bytes=8 * _GB, most_ratio=1.05,
    ),
)  # fmt: skip


@dataclass(slots=True)
class _Way:
    """What was measured of one way, over all its turns."""

    forward_ms: list[float] = field(default_factory=list)
    wait_ms: list[float] = field(default_factory=list)  # per forward, one value per turn
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    streamed_bytes: int = 0  # per forward
    velocity: Tensor | None = None  # of the first forward, on the host

    def take_peaks(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.allocated_bytes = max(
                self.allocated_bytes, torch.cuda.max_memory_allocated(device)
            )
            self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(device))


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """What all ways of one case share."""

    case: ForwardCase
    files: ModelFiles
    depot: Depot
    plan: Plan
    geometry: Geometry
    latents: Tensor
    text: Tensor
    kernels: RowKernels | None


@torch.inference_mode()
def run_case(case: ForwardCase, store: Path, device: torch.device, *, compiled: bool) -> None:
    """Runs every way of a case and says its figures."""
    files = open_model(store, case.spec)
    geometry = geometry_of(case.spec, case.width, case.height, case.num_frames)
    generator = torch.Generator().manual_seed(0)
    bench = _Bench(
        case=case,
        files=files,
        depot=Depot(device),
        plan=_plan(case, device),
        geometry=geometry,
        latents=torch.randn(
            1, case.spec.dit.in_channels, *geometry.latent_shape[1:], generator=generator
        ).to(device),
        text=torch.randn(1, TEXT_TOKENS, case.spec.dit.text_width, generator=generator).to(device),
        kernels=compiled_kernels() if compiled else None,
    )
    measured = {way: _Way() for way in case.ways}
    try:
        for turn in range(case.rounds):
            for way in case.ways:
                _run_turn(bench, way, measured[way])
                note(case.name, way=way, turn=turn, forward_ms=measured[way].forward_ms)
    finally:
        for notice in bench.depot.notices:
            note(case.name, notice=notice)
        bench.depot.release()
        _say_figures(bench, measured)


def _plan(case: ForwardCase, device: torch.device) -> Plan:
    """The planner's own, with fp8 and budget as the case says; its cuts and ring are used."""
    request = VideoRequest(
        prompt="a red circle", model=case.spec.name, width=case.width, height=case.height,
        num_frames=case.num_frames, num_inference_steps=4,
    )  # fmt: skip
    return make_plan(
        resolve(request, case.spec, image_size=(64, 64) if case.spec.needs_image else None),
        read_machine(),
        with_image=case.spec.needs_image,
        weights_precision=case.precision,
        precision=case.precision,
        vram_budget_bytes=case.vram_bytes,
        device="cuda" if device.type == "cuda" else "cpu",
    )


def _run_turn(bench: _Bench, way: Way, measured: _Way) -> None:
    """A turn of one way: weights come, one forward is left out, the others are timed."""
    device, case = bench.depot.device, bench.case
    gc.collect()  # a network and its streamer know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    network, units = streamed_network(bench.files, EXPERT, case.precision, bench.depot)
    assert isinstance(network, Dit)
    forwards = 1 + case.timed
    route = _route(case.spec, forwards)
    streaming, ring = _streaming(bench, way, units)
    work = _workspace(case, bench.geometry, bench.plan.cuts, bench.kernels, device)
    marks = _Marks(device)
    with Streamer(bench.depot, units, route, streaming, ring) as streamer:
        network.present = streamer.present
        text = network.embed_texts([bench.text])[0]
        moment = network.embed_times(torch.full((1, 1), TIMESTEP, device=device))
        before: StreamUse | None = None
        for _ in range(forwards):
            velocity = network.velocity(bench.latents, moment, text, work)
            marks.set()
            if before is None:
                if measured.velocity is None:
                    measured.velocity = velocity.cpu()
                before = streamer.use()  # waits for the device; the slots fill up meanwhile
                marks.restart()
        after = streamer.use()
    assert before is not None
    measured.forward_ms += marks.elapsed_ms()
    measured.wait_ms.append(1000 * (after.waited_s - before.waited_s) / case.timed)
    blocks = [unit for unit in units if unit.name.startswith("blocks.")]
    streamed = [u for u in blocks if streaming.placements[EXPERT].of(u.name) != "resident"]
    measured.streamed_bytes = sum(unit.layout.num_bytes for unit in streamed)
    measured.take_peaks(device)


class _Marks:
    """Points in the GPU's queue and the time between them; on the CPU the clock does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._clock_s: list[float] = []

    def set(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        self._clock_s.append(time.perf_counter())

    def restart(self) -> None:
        """Time counts from here on."""
        self._events.clear()
        self._clock_s.clear()
        self.set()

    def elapsed_ms(self) -> list[float]:
        if not self._events:
            return [1000 * (after - before) for before, after in pairwise(self._clock_s)]
        self._events[-1].synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(self._events)]


def _route(spec: ModelSpec, forwards: int) -> Iterator[Visit]:
    for unit in ONCE_UNITS:
        yield EXPERT, unit
    for _ in range(forwards):
        for i in range(spec.dit.num_blocks):
            yield EXPERT, f"blocks.{i}"


def _streaming(bench: _Bench, way: Way, units: Sequence[Unit]) -> tuple[Streaming, Ring]:
    """Where the weights wait, and the ring that the plan has or would have."""
    names = frozenset(unit.name for unit in units)
    placement = {
        "resident": Placement(resident=names),
        "registered": Placement(registered=names),
        "ring": Placement(),
        "plan": bench.plan.denoise.placements[EXPERT],
    }[way]
    slot_bytes = max(unit.layout.num_bytes for unit in units)
    streaming = dataclasses.replace(
        bench.plan.denoise, placements={EXPERT: placement}, slot_bytes=slot_bytes
    )
    return streaming, bench.plan.ring


def _workspace(
    case: ForwardCase,
    geometry: Geometry,
    cuts: Cuts,
    kernels: RowKernels | None,
    device: torch.device,
) -> Workspace:
    return Workspace(
        case.spec.dit,
        geometry.num_tokens,
        dtype=TORCH_DTYPES[PRECISION_DTYPES[case.precision]],
        device=device,
        rows=cuts.rows,
        heads=cuts.heads,
        kernels=kernels,
    )


def _say_figures(bench: _Bench, measured: Mapping[Way, _Way]) -> None:
    case = bench.case
    common = {"cuts": dataclasses.asdict(bench.plan.cuts), "ring_bytes": bench.plan.ring.num_bytes}
    medians = {way: median(m.forward_ms) for way, m in measured.items() if m.forward_ms}
    floor_gib = _least_bytes(bench) / GIB
    for way, milliseconds in medians.items():
        found = measured[way]
        detail = {
            "forward_ms": found.forward_ms,
            "wait_ms": found.wait_ms,
            "allocated_gib": found.allocated_bytes / GIB,
            "streamed_gb_per_forward": found.streamed_bytes / 1e9,
            **common,
        }
        say(Figure(case.name, f"forward, {way}", milliseconds, "ms", detail=detail))
        say(Figure(case.name, f"waited per forward, {way}", median(found.wait_ms), "ms"))
        if bench.depot.device.type != "cuda":
            continue
        streamed = way != "resident"
        bar = case.most_reserved_gib if streamed else None
        reserved = found.reserved_bytes / GIB
        floor = floor_gib if streamed else None
        say(Figure(case.name, f"reserved, {way}", reserved, "GiB", at_most=bar, floor=floor))
    resident = medians.get("resident")
    for way, milliseconds in medians.items():
        if resident is None or way == "resident":
            continue
        ratio = milliseconds / resident
        name = f"{way} against resident"
        say(Figure(case.name, name, ratio, "x", at_most=case.most_ratio, floor=1.0))
        ours, theirs = measured[way].velocity, measured["resident"].velocity
        assert ours is not None, "a way with a median has run"
        assert theirs is not None, "likewise"
        same = bool(torch.equal(ours, theirs)) and bool(theirs.isfinite().all())
        say(Figure(case.name, f"{way} gives the same velocity as resident", same, must=True))


def _least_bytes(bench: _Bench) -> int:
    """Two blocks, the residual stream in fp32, and q, k, v: what this way of computing must hold.

    The attention's output takes the place of q.
    """
    layouts = bench.files.entries(EXPERT)
    block = sum(e.num_bytes for name, e in layouts.items() if name.startswith("blocks.0."))
    size = bench.geometry.num_tokens * bench.case.spec.dit.width
    element = TORCH_DTYPES[PRECISION_DTYPES[bench.case.precision]].itemsize
    return 2 * block + size * 4 + 3 * size * element
