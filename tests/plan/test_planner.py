"""Plans keep their budgets, more memory is never slower, and every suggestion is true."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import cpu_time
from wanfit.errors import BadOption, DoesNotFit
from wanfit.plan.bytes import shape_of
from wanfit.plan.cards import CARDS, card_named
from wanfit.plan.case import NUM_SLOTS, Case, Shortfall
from wanfit.plan.fit import MOST_SLOTS, fit, spread
from wanfit.plan.machine import Machine, catalogue_machine
from wanfit.plan.plan import Plan, Precision
from wanfit.plan.planner import make_plan, suggestions
from wanfit.plan.seconds import forwards_of
from wanfit.plan.weights import dit_units
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import MODELS, T2V_A14B, TI2V_5B, ModelSpec, spec_named

GB = 10**9
GIB = 1 << 30
H100 = catalogue_machine(card_named("H100 SXM"))


def asked(model: str, **fields: Any) -> ResolvedRequest:
    image = (1280, 720) if spec_named(model).needs_image else None
    return resolve(VideoRequest.parse({"prompt": "", "model": model, **fields}), image_size=image)


def planned(request: ResolvedRequest, machine: Machine = H100, **options: Any) -> Plan:
    return make_plan(request, machine, with_image=request.spec.needs_image, **options)


def blocks(plan: Plan, where: str, network: Any = "high_noise") -> list[int]:
    placement = plan.denoise.placements[network]
    names = [f"blocks.{i}" for i in range(plan.request.spec.dit.num_blocks)]
    return [i for i, name in enumerate(names) if placement.of(name) == where]


sizes = st.tuples(st.integers(2, 80), st.integers(2, 45))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any request on any card, with budgets from hopeless to plenty."""
    spec = draw(st.sampled_from(MODELS))
    columns, rows = draw(sizes)
    grid = spec.grid_px
    request = asked(
        spec.name,
        size=f"{min(columns * grid, 1664)}x{min(rows * grid, 1664)}",
        num_frames=4 * draw(st.integers(0, 40)) + 1,
        steps=draw(st.integers(1, 50)),
        guidance=draw(st.sampled_from([1.0, 4.0])),
    )
    precision: Precision = draw(st.sampled_from(["fp32", "bf16", "fp8"]))
    stored: Precision | None = draw(st.sampled_from([None, precision, "bf16", "fp32"]))
    with_image = spec.needs_image or (spec.takes_image and draw(st.booleans()))
    machine = catalogue_machine(draw(st.sampled_from(CARDS)))
    if draw(st.booleans()):
        machine = dataclasses.replace(machine, pinned_limit_bytes=draw(st.integers(0, 64)) * GB)
    return Case(
        shape=shape_of(request, precision, with_image=with_image),
        machine=machine,
        device=draw(st.sampled_from(["cuda", "cuda", "cpu"])),
        stored=stored,
        vram_bytes=int(draw(st.floats(0.5, 100)) * GIB),
        ram_bytes=int(draw(st.floats(0.5, 300)) * GIB),
    )


@given(cases())
def test_a_plan_keeps_to_its_budgets(case: Case) -> None:
    """Every stage, on the GPU and on the host; and every number is a whole number of bytes."""
    plan = fit(case)
    if isinstance(plan, Shortfall):
        budget = case.vram_bytes if plan.memory == "GPU" else case.ram_bytes
        assert plan.needed_bytes > plan.budget_bytes == budget
        return
    assert plan.device_peak_bytes <= case.vram_bytes
    assert plan.host_peak_bytes <= case.ram_bytes
    for stage in plan.stages:
        parts = (*stage.device_bytes.values(), *stage.host_bytes.values())
        assert all(isinstance(size, int) and size >= 0 for size in parts)
        assert stage.seconds > 0
    if case.device == "cpu":
        assert plan.device_peak_bytes == 0


@given(cases())
def test_a_plan_is_one_that_the_engine_can_obey(case: Case) -> None:
    """Slots hold what streams, cuts divide, placements name real units, nothing is registered
    that cannot be, and registered bytes keep to the pinned limit."""
    plan = fit(case)
    if isinstance(plan, Shortfall):
        return
    spec = plan.request.spec
    units = dit_units(spec.dit, plan.precision)
    counts = forwards_of(case.shape)
    registered_bytes = 0
    for expert in spec.experts:
        placement = plan.denoise.placements[expert]
        assert placement.resident | placement.registered <= units.keys()
        assert not placement.resident & placement.registered
        assert "rest" in placement.resident
        streamed = [size for unit, size in units.items() if unit not in placement.resident]
        assert max(streamed) <= plan.denoise.slot_bytes or not counts[expert]
        registered_bytes += sum(units[unit] for unit in placement.registered)
    assert NUM_SLOTS <= plan.denoise.num_slots <= MOST_SLOTS
    assert spec.dit.num_heads % plan.cuts.heads == 0
    tile = plan.cuts.vae_tile_px
    assert tile is None or (tile % spec.vae.stride_px == 0 and tile >= 128)
    assert plan.ring.num_pieces >= plan.ring.num_readers >= 1
    assert plan.ring.piece_bytes % 4096 == 0
    if registered_bytes:
        assert case.device == "cuda"
        assert case.stored in (None, plan.precision)
        assert plan.ring.num_bytes + registered_bytes <= (
            case.machine.pinned_limit_bytes or 1 << 60
        )


@given(cases(), st.floats(1.0, 4.0), st.floats(1.0, 4.0))
def test_more_memory_is_never_slower(case: Case, vram: float, ram: float) -> None:
    """Up to a thousandth: below that the planner prefers less memory."""
    plan = fit(case)
    more = dataclasses.replace(
        case, vram_bytes=int(case.vram_bytes * vram), ram_bytes=int(case.ram_bytes * ram)
    )
    better = fit(more)
    if isinstance(plan, Plan):
        assert isinstance(better, Plan), (better, "more memory fits less")
        assert better.seconds <= plan.seconds * 1.001 + 0.002


@given(cases())
def test_every_suggestion_fits_and_says_what_it_is(case: Case) -> None:
    """At most four; each plan is for what its text says, within the budgets that it names."""
    if isinstance(fit(case), Plan):
        return
    offers = suggestions(case)
    assert 0 < len(offers) <= 4, "some amount of memory is always enough"
    before = case.shape.request
    for offer in offers:
        request = offer.plan.request
        if found := re.fullmatch(r"--frames (\d+)", offer.text):
            assert request == dataclasses.replace(before, num_frames=int(found[1]))
            assert request.num_frames < before.num_frames
        elif found := re.fullmatch(r"--size (\d+)x(\d+)", offer.text):
            width, height = int(found[1]), int(found[2])
            assert request == dataclasses.replace(before, width=width, height=height)
            assert width * height < before.width * before.height
        elif "fp8" in offer.text:
            assert offer.plan.precision == "fp8" != case.shape.precision
            assert request == before
        else:
            assert re.fullmatch(r"[\d.]+ [GM]iB of .*(GPU memory|RAM)", offer.text)
            assert request == before
            continue
        assert offer.plan.device_peak_bytes <= case.vram_bytes
        assert offer.plan.host_peak_bytes <= case.ram_bytes


def test_a_suggested_amount_of_memory_is_enough_as_printed() -> None:
    """A person types what they read, rounded as it is."""
    request = asked("t2v-a14b", size="1280x720")
    with pytest.raises(DoesNotFit) as raised:
        planned(request, vram_budget_bytes=4 * GIB)
    (amount,) = re.findall(r"([\d.]+) GiB of GPU memory$", raised.value.hint)
    assert planned(request, vram_budget_bytes=int(float(amount) * GIB))


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_planning_takes_milliseconds(spec: ModelSpec) -> None:
    """The best of a few: a plan, and a refusal with its suggestions."""
    request = asked(spec.name)

    def best_s(vram_bytes: int) -> float:
        def ask() -> None:
            with contextlib.suppress(DoesNotFit):
                planned(request, vram_budget_bytes=vram_bytes)

        return min(cpu_time.of_this_thread_s(ask) for _ in range(5))

    assert best_s(80 * GIB) < 0.05
    assert best_s(GIB) < 0.05


class TestWhatTheIssueAsksFor:
    """Issue 4's table, as far as a plan can say it."""

    def test_a14b_720p_fits_31_gb_and_117_gb_of_ram(self) -> None:
        plan = planned(
            asked("t2v-a14b", size="1280x720", num_frames=81),
            catalogue_machine(card_named("rtx5090")),
            ram_budget_bytes=117 * GB,
        )
        assert plan.host_peak_bytes < 70 * GB
        denoise = next(stage for stage in plan.stages if stage.stage == "denoise")
        assert sum(denoise.device_bytes.values()) < 7.0 * GIB
        assert denoise.limit == "compute"
        assert len(blocks(plan, "registered")) == 40

    def test_a14b_720p_fits_8_gb(self) -> None:
        request = asked("t2v-a14b", size="1280x720", num_frames=81)
        assert planned(request, vram_budget_bytes=8 * GB, ram_budget_bytes=117 * GB)

    def test_a14b_720p_fp8_fits_8_gb_and_16_gb_of_ram(self) -> None:
        """What RAM cannot hold comes from disk at every step, around the page cache."""
        plan = planned(
            asked("t2v-a14b", size="1280x720", num_frames=81),
            precision="fp8",
            vram_budget_bytes=8 * GB,
            ram_budget_bytes=16 * GB,
        )
        assert plan.ring.direct
        assert blocks(plan, "mapped")
        assert plan.host_peak_bytes <= 16 * GB

    def test_fp8_needs_half_the_ram(self) -> None:
        plan = planned(
            asked("t2v-a14b", size="1280x720"), precision="fp8", ram_budget_bytes=117 * GB
        )
        assert len(blocks(plan, "registered")) == 40
        assert plan.host_peak_bytes < 40 * GB

    @pytest.mark.parametrize("frames", [25, 121])
    @pytest.mark.parametrize("vram_bytes", [24 * GB, int(31.37 * GIB)])
    def test_ti2v_5b_fits(self, frames: int, vram_bytes: int) -> None:
        assert planned(asked("ti2v-5b", num_frames=frames), vram_budget_bytes=vram_bytes)

    def test_a_short_ti2v_5b_in_8_gb_holds_blocks_since_copies_do_not_hide(self) -> None:
        plan = planned(asked("ti2v-5b", num_frames=25), vram_budget_bytes=8 * GB)
        resident = blocks(plan, "resident")
        assert 5 < len(resident) < 30
        gaps = [after - before for before, after in itertools.pairwise(resident)]
        assert max(gaps) - min(gaps) <= 1, "spread evenly"


class TestChoices:
    def test_nothing_is_resident_where_copies_hide(self) -> None:
        plan = planned(asked("t2v-a14b", size="1280x720"))
        assert blocks(plan, "resident") == []
        assert plan.denoise.num_slots == 2

    def test_all_is_resident_where_it_fits_and_copies_do_not_hide(self) -> None:
        plan = planned(asked("ti2v-5b", num_frames=5))
        assert len(blocks(plan, "resident")) == TI2V_5B.dit.num_blocks

    def test_experts_share_what_there_is_evenly(self) -> None:
        plan = planned(asked("t2v-a14b", size="832x480"), ram_budget_bytes=24 * GB,
                       vram_budget_bytes=24 * GB)  # fmt: skip
        high, low = (plan.denoise.placements[expert] for expert in T2V_A14B.experts)
        assert high == low

    def test_little_ram_maps_and_reads_directly(self) -> None:
        plan = planned(
            asked("t2v-a14b", size="1280x720"),
            vram_budget_bytes=12 * GIB,
            ram_budget_bytes=12 * GB,
        )
        assert plan.ring.direct
        assert len(blocks(plan, "mapped")) > len(blocks(plan, "registered"))

    def test_one_expert_in_the_page_cache_beats_half_of_both_registered(self) -> None:
        """40 GB hold the 28 GB of the expert that runs; a part of both would read the disk."""
        plan = planned(
            asked("t2v-a14b", size="832x480"), vram_budget_bytes=8 * GIB, ram_budget_bytes=40 * GB
        )
        assert not plan.ring.direct
        assert len(blocks(plan, "mapped")) == 40

    def test_what_cannot_be_registered_is_mapped(self) -> None:
        unpinnable = dataclasses.replace(H100, pinned_limit_bytes=0)
        assert blocks(planned(asked("t2v-a14b"), unpinnable), "registered") == []

    def test_weights_of_another_precision_are_mapped(self) -> None:
        """They are changed on their way, so CUDA cannot copy them from the file."""
        plan = planned(asked("t2v-a14b"), weights_precision="fp32", vram_budget_bytes=12 * GIB)
        assert plan.precision == "bf16"
        assert len(blocks(plan, "mapped")) == 40
        assert any("fp32" in note for note in plan.notes)

    def test_an_expert_without_a_step_takes_nothing(self) -> None:
        plan = planned(asked("t2v-a14b", size="832x480", steps=1))
        assert blocks(plan, "registered", "low_noise") == []
        assert blocks(plan, "resident", "low_noise") == []

    def test_small_budgets_cut_rows_and_tile_the_vae(self) -> None:
        request = asked("t2v-a14b", size="1280x720")
        roomy, tight = planned(request), planned(request, vram_budget_bytes=int(6.5 * GIB))
        assert roomy.cuts.vae_tile_px is None
        assert roomy.cuts.rows == 8192
        assert tight.cuts.rows < 8192
        assert tight.cuts.vae_tile_px is not None

    def test_a_machine_without_a_gpu_runs_on_the_cpu_in_fp32(self) -> None:
        machine = dataclasses.replace(H100, gpu=None, vram_total_bytes=0, vram_free_bytes=0)
        plan = planned(asked("demo"), machine)
        assert (plan.device, plan.precision) == ("cpu", "fp32")
        assert plan.device_peak_bytes == 0
        assert len(blocks(plan, "resident")) == 8
        assert plan.host_peak_bytes < 4 * GB

    def test_the_cpu_takes_slots_where_ram_is_short(self) -> None:
        plan = planned(asked("ti2v-5b", size="320x192", num_frames=5), device="cpu",
                       ram_budget_bytes=12 * GB)  # fmt: skip
        assert blocks(plan, "resident") == []

    @pytest.mark.parametrize(
        ("wanted", "stored", "device", "runs"),
        [
            ("auto", None, "cuda", "bf16"),
            ("auto", "fp32", "cuda", "bf16"),
            ("auto", "fp8", "cuda", "fp8"),
            ("auto", None, "cpu", "fp32"),
            ("auto", "fp8", "cpu", "fp8"),
            ("fp8", None, "cuda", "fp8"),
            ("fp32", "bf16", "cuda", "fp32"),
        ],
    )
    def test_precision(self, wanted: Any, stored: Any, device: Any, runs: str) -> None:
        plan = planned(asked("ti2v-5b"), precision=wanted, weights_precision=stored, device=device)
        assert plan.precision == runs

    def test_fp8_weights_give_nothing_finer(self) -> None:
        with pytest.raises(BadOption, match="fp8"):
            planned(asked("ti2v-5b"), precision="bf16", weights_precision="fp8")

    def test_no_gpu_no_cuda(self) -> None:
        machine = dataclasses.replace(H100, gpu=None)
        with pytest.raises(BadOption, match="no GPU"):
            planned(asked("demo"), machine, device="cuda")

    def test_by_default_nearly_all_that_is_free_is_the_budget(self) -> None:
        busy = dataclasses.replace(H100, vram_free_bytes=20 * GIB)
        plan = planned(asked("ti2v-5b"), busy)
        assert 19 * GIB < plan.vram_budget_bytes < 20 * GIB
        assert any("held by others" in note for note in plan.notes)


class TestDoesNotFit:
    def test_it_says_by_how_much_where_and_what_would_fit(self) -> None:
        with pytest.raises(DoesNotFit) as raised:
            planned(asked("t2v-a14b", size="1280x720"), vram_budget_bytes=4 * GIB)
        assert "while denoising" in raised.value.message
        assert "4.0 GiB are there" in raised.value.message
        assert "--frames" in raised.value.hint
        assert "--size" in raised.value.hint

    def test_ram(self) -> None:
        with pytest.raises(DoesNotFit, match="of RAM while") as raised:
            planned(asked("t2v-a14b"), ram_budget_bytes=1 * GB)
        assert re.search(r"[\d.]+ GiB of RAM", raised.value.hint)


@given(st.integers(1, 60), st.integers(1, 60))
@example(1, 1)
def test_spread_is_even(total: int, count: int) -> None:
    """Distinct, in order, and with gaps that differ by one at most."""
    count = min(count, total)
    places = spread(count, total)
    assert len(set(places)) == count
    assert places[0] == 0
    assert all(0 <= place < total for place in places)
    around = [*places, places[0] + total]
    gaps = [after - before for before, after in itertools.pairwise(around)]
    assert max(gaps) - min(gaps) <= 1
