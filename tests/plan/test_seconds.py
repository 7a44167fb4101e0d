"""Times against what was measured, and counts against the code that makes the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanfit.engine.schedule import make_schedule
from wanfit.plan.bytes import Shape, shape_of
from wanfit.plan.cards import card_named
from wanfit.plan.machine import Machine, catalogue_machine
from wanfit.plan.plan import Ring
from wanfit.plan.seconds import (
    Rates,
    Traffic,
    decode_s,
    encode_s,
    forward_compute_s,
    forward_s,
    forwards_of,
    hides,
    rates_of,
    text_compute_s,
)
from wanfit.request import VideoRequest, resolve
from wanfit.specs import MODELS, NUM_TRAIN_TIMESTEPS, ModelSpec, Solver

H100 = catalogue_machine(card_named("H100 SXM"))
RING = Ring(8, 64 << 20, 4, direct=False)


def shape(model: str, size: str, frames: int, **fields: object) -> Shape:
    wanted = {"prompt": "", "model": model, "size": size, "num_frames": frames, **fields}
    spec_needs_image = model == "i2v-a14b"
    request = resolve(
        VideoRequest.parse(wanted), image_size=(640, 360) if spec_needs_image else None
    )
    return shape_of(request, "bf16", with_image=spec_needs_image)


def rates(machine: Machine = H100, **ring: object) -> Rates:
    return rates_of(machine, shape("t2v-a14b", "832x480", 81), "cuda", RING)


@pytest.mark.parametrize(
    ("model", "size", "frames", "measured_s"),
    [
        ("t2v-a14b", "1280x720", 81, 12.752),
        ("t2v-a14b", "832x480", 81, 3.510),
        ("ti2v-5b", "1280x704", 121, 1.130),
        ("ti2v-5b", "1280x704", 25, 0.174),
    ],
)
def test_a_forward_on_an_h100_takes_about_what_was_measured(
    model: str, size: str, frames: int, measured_s: float
) -> None:
    """benchmarks/RESULTS.md, all weights resident, eager."""
    made = shape(model, size, frames)
    expected = forward_compute_s(made, rates())
    assert expected == pytest.approx(measured_s, rel=0.02)


@given(
    solver=st.sampled_from(["unipc", "dpm++", "euler"]),
    steps=st.integers(1, 60),
    shift=st.floats(0.1, 30),
    spec=st.sampled_from(MODELS),
    high=st.sampled_from([1.0, 4.0]),
    low=st.sampled_from([1.0, 3.0]),
    moved=st.none() | st.floats(0, 1),
)
def test_forwards_are_those_of_the_schedule(
    solver: Solver, steps: int, shift: float, spec: ModelSpec, high: float, low: float,
    moved: float | None,
) -> None:  # fmt: skip
    """Each expert's steps, twice where its guidance is not 1, wherever the boundary lies."""
    if spec.boundary is None:
        moved = None
    made = shape(
        spec.name, f"{spec.sampling.width}x{spec.sampling.height}", spec.sampling.num_frames,
        solver=solver, steps=steps, shift=shift, guidance_high=high, guidance_low=low,
        boundary=moved,
    )  # fmt: skip
    times = make_schedule(solver, steps, shift).timesteps
    asked = spec.boundary if moved is None else moved
    boundary = -1.0 if asked is None else asked * NUM_TRAIN_TIMESTEPS
    num_high = sum(time >= boundary for time in times)
    expected = {"high_noise": num_high * (1 + (high != 1))}
    if spec.boundary is not None:
        expected["low_noise"] = (steps - num_high) * (1 + (low != 1))
    assert forwards_of(made) == expected


def test_the_slowest_of_compute_link_and_ring_is_the_limit() -> None:
    known = Rates(1, 1, 1, 1, link=10.0, ring=5.0, disk_bound=False)
    assert forward_s(9.0, Traffic(streamed=50, mapped=10), known) == (9.0, "compute")
    assert forward_s(1.0, Traffic(streamed=50, mapped=10), known) == (5.0, "link")
    assert forward_s(1.0, Traffic(streamed=50, mapped=50), known) == (10.0, "host")
    from_disk = Rates(1, 1, 1, 1, link=10.0, ring=5.0, disk_bound=True)
    assert forward_s(1.0, Traffic(streamed=50, mapped=50), from_disk) == (10.0, "disk")


def test_copies_hide_only_with_room_to_err() -> None:
    known = Rates(1, 1, 1, 1, link=10.0, ring=5.0, disk_bound=False)
    assert hides(10.0, Traffic(streamed=80, mapped=0), known)
    assert not hides(10.0, Traffic(streamed=95, mapped=0), known)


def test_a_direct_ring_is_as_fast_as_the_disk_at_most() -> None:
    made = shape("t2v-a14b", "832x480", 81)
    direct = rates_of(H100, made, "cuda", Ring(8, 64 << 20, 8, direct=True))
    cached = rates_of(H100, made, "cuda", Ring(8, 64 << 20, 8, direct=False))
    assert direct.ring == H100.disk_bytes_per_s < cached.ring
    assert direct.disk_bound


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_tiles_cost_time_and_the_rest_is_positive(spec: ModelSpec) -> None:
    sampling = spec.sampling
    made = shape(spec.name, f"{sampling.width}x{sampling.height}", sampling.num_frames)
    known = rates()
    assert decode_s(made, 64, known) > decode_s(made, None, known) > 0
    assert encode_s(made, None, known) > 0
    assert text_compute_s(made, known) > 0
