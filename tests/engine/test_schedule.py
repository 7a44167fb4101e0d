"""Schedules against the official lists, solvers against diffusers and against known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wanfit.engine.schedule import UNIPC_FIRST_SIGMA, Schedule, make_schedule, make_solver
from wanfit.request import MAX_STEPS, SHIFT_RANGE
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec, Solver

SOLVERS: tuple[Solver, ...] = ("unipc", "dpm++", "euler")

# run: the official FlowUniPCMultistepScheduler (fact sheet A 3.1)
GOLDEN_TIMESTEPS = {
    "t2v-a14b": """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929
        922 915 907 898 888 877 865 852 837 819 799 776 749 717 678 631 571 492 386 235""",
    "i2v-a14b": """999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846
        833 818 803 786 768 749 728 706 681 654 624 591 555 514 468 416 356 288 208 113""",
    "ti2v-5b": """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890
        882 873 863 854 843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584
        555 522 487 448 405 356 302 241 172 92""",
}
# The first two and the last two before 0.
GOLDEN_SIGMAS = {
    "t2v-a14b": (0.9999166, 0.9977826, 0.3868470, 0.2351095),
    "i2v-a14b": (0.9997998, 0.9946948, 0.2081597, 0.1135330),
}


def default_schedule(spec: ModelSpec) -> Schedule:
    sampling = spec.sampling
    return make_schedule(sampling.solver, sampling.num_inference_steps, sampling.shift)


@pytest.mark.parametrize("spec", [T2V_A14B, I2V_A14B, TI2V_5B], ids=lambda spec: spec.name)
def test_default_timesteps_are_the_official_integers(spec: ModelSpec) -> None:
    golden = tuple(float(timestep) for timestep in GOLDEN_TIMESTEPS[spec.name].split())
    assert default_schedule(spec).timesteps == golden


@pytest.mark.parametrize("spec", [T2V_A14B, I2V_A14B], ids=lambda spec: spec.name)
def test_default_sigmas_are_the_official_ones(spec: ModelSpec) -> None:
    sigmas = default_schedule(spec).sigmas
    ends = (*sigmas[:2], *sigmas[-3:-1])
    assert ends == pytest.approx(GOLDEN_SIGMAS[spec.name], abs=1e-7)
    assert sigmas[-1] == 0.0


@pytest.mark.parametrize(("spec", "high_steps"), [(T2V_A14B, 26), (I2V_A14B, 15)])
def test_experts_switch_after_the_official_number_of_steps(
    spec: ModelSpec, high_steps: int
) -> None:
    assert spec.boundary is not None
    timesteps = default_schedule(spec).timesteps
    assert sum(timestep >= spec.boundary * 1000 for timestep in timesteps) == high_steps


def test_first_unipc_sigma_is_the_fp32_value_that_the_official_scheduler_stores() -> None:
    assert float(np.float32(1.0 - 1 / 1000)) == UNIPC_FIRST_SIGMA


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_every_step_count_gives_the_integers_of_the_official_numpy_arithmetic(
    solver: Solver, shift: float
) -> None:
    """Truncation sees the last bit of 1000 sigma, so the arithmetic must be the same to the bit."""
    for num_steps in range(1, MAX_STEPS + 1, 7):
        first = UNIPC_FIRST_SIGMA if solver == "unipc" else 1.0
        even = np.linspace(first, 0, num_steps + 1)[:-1]
        official = shift * even / (1 + (shift - 1) * even) * 1000
        ours = make_schedule(solver, num_steps, shift).timesteps
        assert [int(timestep) for timestep in ours] == official.astype(np.int64).tolist()


def test_euler_tells_the_distilled_models_the_four_timesteps_that_they_were_trained_on() -> None:
    """fact sheet B 4.9: base sigmas 1, 3/4, 1/2, 1/4 at shift 5; the timesteps stay fractions."""
    schedule = make_schedule("euler", 4, 5.0)
    assert schedule.sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0))
    assert schedule.timesteps == pytest.approx((1000.0, 937.5, 5000 / 6, 625.0))


@settings(deadline=None)  # a thousand steps on a busy machine
@given(
    solver=st.sampled_from(SOLVERS),
    num_steps=st.one_of(st.integers(1, 60), st.just(MAX_STEPS)),
    shift=st.floats(*SHIFT_RANGE),
)
def test_every_legal_schedule_falls_to_zero_and_can_be_walked(
    solver: Solver, num_steps: int, shift: float
) -> None:
    """Schedule's own assertions hold for all that a request may ask, and no weight is infinite."""
    schedule = make_schedule(solver, num_steps, shift)
    assert all(0 <= timestep <= 1000 for timestep in schedule.timesteps)
    flow = make_solver(solver, schedule)
    latents = torch.ones(1)
    for _ in schedule.timesteps:
        latents = flow.step(torch.full((1,), 0.25), latents)
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("sigmas", "timesteps"),
    [
        ((0.0,), ()),
        ((0.5, 0.0), (500.0, 0.0)),
        ((0.5, 0.1), (500.0,)),
        ((0.5, 0.6, 0.0), (500.0, 600.0)),
        ((0.5, 0.5, 0.0), (500.0, 500.0)),
        ((1.1, 0.0), (1100.0,)),
    ],
    ids=["no steps", "lengths differ", "noise is left", "rises", "stands still", "above 1"],
)
def test_a_schedule_that_does_not_fall_to_zero_is_refused(
    sigmas: tuple[float, ...], timesteps: tuple[float, ...]
) -> None:
    with pytest.raises(AssertionError):
        Schedule(sigmas=sigmas, timesteps=timesteps)


# --- parity with diffusers -----------------------------------------------------------------------

reference = import_module("diffusers.schedulers")  # by name, since its classes carry no types

STEP_COUNTS = (1, 2, 3, 4, 10, 40)
# diffusers reads a torch tensor as a numpy array, in the way that numpy 2 warns of.
numpy_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def velocity_at(step: int, latents: Tensor) -> Tensor:
    """A made-up network: another noise at every step, and a reaction to the latents."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
    return 0.5 * noise + 0.5 * torch.tanh(latents)


def walk(solver: Solver, schedule: Schedule, latents: Tensor) -> Tensor:
    flow = make_solver(solver, schedule)
    for index in range(len(schedule.timesteps)):
        latents = flow.step(velocity_at(index, latents), latents)
    return latents


def walk_reference(scheduler: Any, latents: Tensor) -> Tensor:
    scheduler.set_begin_index(0)  # by position: timesteps may repeat
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = velocity_at(index, latents)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def start() -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(7))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """2e-6 of the largest value: what 40 steps in fp32 lose (the official code differs as much)."""
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_unipc_equals_diffusers_on_the_official_grid(num_steps: int, shift: float) -> None:
    schedule = make_schedule("unipc", num_steps, shift)
    scheduler = reference.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    # diffusers shifts what it is given.
    scheduler.set_timesteps(sigmas=np.linspace(UNIPC_FIRST_SIGMA, 0, num_steps + 1)[:-1])

    assert tuple(scheduler.timesteps.tolist()) == schedule.timesteps
    assert scheduler.sigmas.tolist() == pytest.approx(schedule.sigmas, abs=1e-7)
    assert_same(walk("unipc", schedule, start()), walk_reference(scheduler, start()))


def dpm_scheduler(num_steps: int, shift: float) -> Any:
    scheduler = reference.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@numpy_warns
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_dpm_solver_equals_diffusers_on_its_own_grid(num_steps: int) -> None:
    """diffusers runs its DPM-Solver on the grid that the official code has for UniPC."""
    schedule = make_schedule("unipc", num_steps, 5.0)
    scheduler = dpm_scheduler(num_steps, 5.0)
    assert scheduler.sigmas.tolist() == pytest.approx(schedule.sigmas, abs=1e-7)
    assert_same(walk("dpm++", schedule, start()), walk_reference(scheduler, start()))


@numpy_warns
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_dpm_solver_equals_diffusers_from_pure_noise(num_steps: int) -> None:
    """The official dpm++ grid starts at sigma 1, where lambda is minus infinity."""
    schedule = make_schedule("dpm++", num_steps, 5.0)
    assert schedule.sigmas[0] == 1.0
    scheduler = dpm_scheduler(num_steps, 5.0)
    scheduler.sigmas = torch.tensor(schedule.sigmas)
    assert_same(walk("dpm++", schedule, start()), walk_reference(scheduler, start()))


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_euler_equals_diffusers_on_the_distilled_grid(num_steps: int, shift: float) -> None:
    schedule = make_schedule("euler", num_steps, shift)
    scheduler = reference.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    assert scheduler.timesteps.tolist() == pytest.approx(schedule.timesteps, rel=1e-6)
    assert_same(walk("euler", schedule, start()), walk_reference(scheduler, start()))


# --- order of convergence ------------------------------------------------------------------------
# For data drawn from a Gaussian the best network is known: clean given x is linear in x, and along
# the way (x - mean) / deviation of the noisy clip stays the same, whatever sigma.

DATA_MEAN, DATA_DEVIATION = 0.3, 0.5


def deviation(sigma: float) -> float:
    return math.hypot((1 - sigma) * DATA_DEVIATION, sigma)


def gaussian_velocity(sigma: float, latents: Tensor) -> Tensor:
    share = (1 - sigma) * (DATA_DEVIATION / deviation(sigma)) ** 2
    clean = DATA_MEAN + share * (latents - (1 - sigma) * DATA_MEAN)
    return (latents - clean) / sigma


def gaussian_answer(begin: float, end: float, latents: Tensor) -> Tensor:
    standard = (latents - (1 - begin) * DATA_MEAN) / deviation(begin)
    return (1 - end) * DATA_MEAN + deviation(end) * standard


def gaussian_error(solver: Solver, schedule: Schedule, num_steps: int) -> float:
    """The error of the first `num_steps` steps, in fp64 so that rounding hides nothing."""
    first = torch.tensor([1.3, -0.7, 2.0], dtype=torch.float64)
    flow, latents = make_solver(solver, schedule), first
    for sigma in schedule.sigmas[:num_steps]:
        latents = flow.step(gaussian_velocity(sigma, latents), latents)
    answer = gaussian_answer(schedule.sigmas[0], schedule.sigmas[num_steps], first)
    return float((latents - answer).abs().max())


def fitted_order(error_of: Callable[[int], float]) -> float:
    """The slope of log error over log step size, as diffrax fits it."""
    counts = (80, 160, 320, 640)
    slope = np.polyfit(np.log(counts), np.log([error_of(count) for count in counts]), 1)[0]
    return float(-slope)


def inner_schedule(num_steps: int) -> Schedule:
    """Even steps from sigma 0.9 to 0.1, and one more to 0 that is not to be taken."""
    inner = tuple(0.9 - 0.8 * i / num_steps for i in range(num_steps + 1))
    return Schedule(sigmas=(*inner, 0.0), timesteps=(0.0,) * (num_steps + 1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence_between_the_ends(solver: Solver, order: int) -> None:
    """From sigma 0.9 to 0.1: there the last step, which is of first order, plays no part.

    The first step is of first order too, but it is one among N: its error of 1/N^2 is no larger
    than that of all the steps of dpm++ together, and in UniPC the corrector repairs it. UniPC of
    order p is of order p + 1 with its corrector (so the paper): that is what the correction gains.
    """

    def error_of(count: int) -> float:
        return gaussian_error(solver, inner_schedule(count), count)

    assert fitted_order(error_of) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_order_of_convergence_of_a_whole_clip(solver: Solver, order: int) -> None:
    """From noise to sigma 0 at shift 1: the last step holds UniPC to order 2.

    dpm++ is left out: near both ends its steps grow long in lambda and add a factor of log N, so
    the fitted slope (1.8) says little.
    """

    def error_of(count: int) -> float:
        return gaussian_error(solver, make_schedule(solver, count, 1.0), count)

    assert fitted_order(error_of) == pytest.approx(order, abs=0.1)


# --- what a solver promises ----------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_the_last_step_gives_the_last_prediction_exactly(solver: Solver, num_steps: int) -> None:
    schedule = make_schedule(solver, num_steps, 5.0)
    flow, latents = make_solver(solver, schedule), start()
    for index in range(num_steps - 1):
        latents = flow.step(velocity_at(index, latents), latents)
    velocity = velocity_at(num_steps, latents)
    assert torch.equal(
        flow.step(velocity, latents), latents - schedule.sigmas[num_steps - 1] * velocity
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_perfect_network_gives_the_clean_clip_in_any_number_of_steps(solver: Solver) -> None:
    """With velocity = noise - clean all solvers are exact, since the prediction never changes."""
    clean, noise = start(), start().flip(0)
    schedule = make_schedule(solver, 7, 5.0)
    flow, first = make_solver(solver, schedule), schedule.sigmas[0]
    latents = (1 - first) * clean + first * noise
    for _ in schedule.timesteps:
        latents = flow.step(noise - clean, latents)
    assert torch.allclose(latents, clean, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_leaves_its_inputs_alone_and_keeps_their_dtype(solver: Solver) -> None:
    flow = make_solver(solver, make_schedule(solver, 3, 5.0))
    latents = start()
    for index in range(3):
        velocity = velocity_at(index, latents)
        before = latents.clone(), velocity.clone()
        after = flow.step(velocity, latents)
        assert torch.equal(latents, before[0])
        assert torch.equal(velocity, before[1])
        assert after.dtype == torch.float32
        latents = after


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_beyond_the_schedule_is_refused(solver: Solver) -> None:
    schedule = make_schedule(solver, 2, 5.0)
    flow, latents = make_solver(solver, schedule), start()
    for index in range(2):
        latents = flow.step(velocity_at(index, latents), latents)
    with pytest.raises(AssertionError, match="no step is left"):
        flow.step(latents, latents)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_two_clips_do_not_share_their_history(solver: Solver) -> None:
    schedule = make_schedule(solver, 4, 5.0)
    alone = walk(solver, schedule, start())
    ours, other = make_solver(solver, schedule), make_solver(solver, schedule)
    latents, others = start(), 2 * start()
    for index in range(4):
        others = other.step(velocity_at(index + 9, others), others)
        latents = ours.step(velocity_at(index, latents), latents)
    assert torch.equal(latents, alone)


def test_unipc_corrects_with_what_the_network_saw_at_the_end_of_the_step() -> None:
    """The two solvers take the same first step, and part as soon as there is a step to correct."""
    schedule = make_schedule("unipc", 4, 5.0)
    corrected, extrapolated = make_solver("unipc", schedule), make_solver("dpm++", schedule)
    first = start()
    velocity = velocity_at(0, first)
    second = corrected.step(velocity, first)
    assert torch.equal(second, extrapolated.step(velocity, first))
    velocity = velocity_at(1, second)
    difference = corrected.step(velocity, second) - extrapolated.step(velocity, second)
    assert difference.abs().max() > 1e-4
