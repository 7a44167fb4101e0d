"""Sigma schedules, and the three solvers that walk them from noise to a clip.

A noisy clip mixes a clean one with noise, x = (1 - sigma) clean + sigma noise, and the network
returns velocity = noise - clean. So every evaluation predicts the clean clip:

    m = x - sigma velocity

Were m the same all along the way, a step from sigma to sigma' would be exactly

    x' = r x + (1 - r) m,   r = sigma' / sigma

In truth m changes a little as the noise falls, and the exact step takes its average A over the
step in place of m. Written in lambda = ln((1 - sigma) / sigma), which grows as the noise falls, a
step has the length h, u runs from 0 at its start to 1 at its end, and

    A = average of m(u), each point weighted by exp(-h (1 - u))

The solvers differ only in how they guess A. Each step costs one evaluation of the network.

    euler    m at the start of the step. Order 1.
    dpm++    the line through the last two predictions, drawn on over the step. Order 2.
             DPM-Solver++ (2M), arXiv:2211.01095.
    unipc    the same, and when the network has seen the end of the step, the step is done again
             with the parabola through the last three predictions. Order 3 on the way, though the
             last step, which has nobody to correct it, holds the whole to 2.
             UniPC (order 2, bh2), arXiv:2302.04867. The default.

Where the official code and diffusers disagree (only in the grid), this is the official one. Left
out: orders above 2, stochastic solvers, dynamic shift and thresholding, which Wan does not use.

Coefficients are Python floats (fp64); tensors keep their dtype, which is fp32 while sampling.
Tensors are [C, T, H, W] or any other shape: all is elementwise, so this file needs no torch.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from wanfit.specs import NUM_TRAIN_TIMESTEPS, Solver

if TYPE_CHECKING:
    from torch import Tensor

# official: fm_solvers_unipc.py, sigma_max: 1 - 1/1000, stored as fp32
UNIPC_FIRST_SIGMA = 0.9990000128746033


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise levels of N steps. Steps are counted by position: timesteps may repeat."""

    sigmas: tuple[float, ...]  # N + 1, falling, the last one 0
    timesteps: tuple[float, ...]  # N: what the network is told at each step, in 0..1000

    def __post_init__(self) -> None:
        assert len(self.sigmas) == len(self.timesteps) + 1 >= 2, "a sigma more than timesteps"
        assert self.sigmas[0] <= 1.0, "sigma is a share of noise"
        assert self.sigmas[-1] == 0.0, "the last step ends without noise"
        assert all(now > then for now, then in pairwise(self.sigmas)), "sigmas fall"


def make_schedule(solver: Solver, num_steps: int, shift: float) -> Schedule:
    """The official schedule of that solver: even steps from its first sigma to 0, then shifted.

    A larger `shift` spends more of the steps on high noise. official: fm_solvers_unipc.py and, for
    dpm++, fm_solvers.py: there the solver uses the sigma, and the network is told 1000 sigma
    truncated to an integer. euler is for the distilled models, which are told 1000 sigma as it is
    (Wan2.2-Lightning, fm_solvers_euler.py).
    """
    assert num_steps >= 1, "a schedule has steps"
    first = UNIPC_FIRST_SIGMA if solver == "unipc" else 1.0
    even_step = first / num_steps  # in this order, as numpy.linspace: truncation sees the last bit
    sigmas = tuple(_shifted(first - i * even_step, shift) for i in range(num_steps))
    timesteps = (NUM_TRAIN_TIMESTEPS * sigma for sigma in sigmas)
    if solver != "euler":
        timesteps = (float(math.trunc(timestep)) for timestep in timesteps)
    return Schedule(sigmas=(*sigmas, 0.0), timesteps=tuple(timesteps))


def _shifted(sigma: float, shift: float) -> float:
    # For some shifts the quotient of 1 rounds to just above 1.
    return min(1.0, shift * sigma / (1 + (shift - 1) * sigma))


class FlowSolver(Protocol):
    """Carries latents down a schedule. It remembers past predictions: one solver per clip."""

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """The latents at the next sigma, in their own dtype; both tensors have the same shape.

        Called once per step, in order; `latents` is what the last call returned, and `velocity`
        what the network made of it, whichever expert that was.
        """
        ...


def make_solver(solver: Solver, schedule: Schedule) -> FlowSolver:
    """A fresh solver at the start of `schedule`. Any solver can walk any schedule."""
    match solver:
        case "euler":
            return Euler(schedule)
        case "dpm++":
            return Multistep(schedule, corrects=False)
        case "unipc":
            return Multistep(schedule, corrects=True)


class Euler:
    """x' = x + (sigma' - sigma) velocity, which is the step above with A = m."""

    def __init__(self, schedule: Schedule) -> None:
        self._steps = pairwise(schedule.sigmas)

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """See FlowSolver."""
        sigma_pair = next(self._steps, None)
        assert sigma_pair is not None, "no step is left in the schedule"
        sigma, next_sigma = sigma_pair
        return latents + (next_sigma - sigma) * velocity


class Multistep:
    """DPM-Solver++ (2M) and, with `corrects`, UniPC: both extrapolate in the same way."""

    def __init__(self, schedule: Schedule, *, corrects: bool) -> None:
        self._sigmas = schedule.sigmas
        self._lambdas = tuple(_lambda(sigma) for sigma in schedule.sigmas)
        self._corrects = corrects
        self._index = 0  # of the step to come
        self._predictions: deque[Tensor] = deque(maxlen=3)  # m, the newest last
        self._start: Tensor | None = None  # where the last step began, corrected

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """See FlowSolver."""
        index = self._index
        assert index < len(self._sigmas) - 1, "no step is left in the schedule"
        self._predictions.append(latents - self._sigmas[index] * velocity)
        if self._corrects and self._start is not None:
            # The newest prediction stays as it is: a corrected one would cost another evaluation.
            latents = self._move(self._start, index - 1, self._interpolated(index - 1))
        self._start = latents
        self._index = index + 1
        return self._move(latents, index, self._extrapolated(index))

    def _move(self, latents: Tensor, index: int, average: Tensor) -> Tensor:
        """Takes step `index` with that average; the last step, with ratio 0, returns it exactly."""
        ratio = self._sigmas[index + 1] / self._sigmas[index]
        return ratio * latents + (1 - ratio) * average

    def _extrapolated(self, index: int) -> Tensor:
        """The average over step `index` as its start shows it, from the past."""
        newest = self._predictions[-1]
        if index == 0 or index == len(self._sigmas) - 2:
            return newest  # the first step has no past; the last is infinitely long (lambda)
        slope = (newest - self._predictions[-2]) / self._previous_length(index)
        # Half of the slope, as at the middle: the authors' stand-in for the weighted mean of u.
        return newest + 0.5 * slope

    def _interpolated(self, index: int) -> Tensor:
        """The average over step `index` as its end shows it, whose prediction is the newest."""
        start, end = self._predictions[-2], self._predictions[-1]
        if index == 0:
            return start + 0.5 * (end - start)
        previous_length = self._previous_length(index)
        slope = (start - self._predictions[-3]) / previous_length
        weight_slope, weight_end = _parabola_weights(self._length(index), previous_length)
        return start + weight_slope * slope + weight_end * (end - start)

    def _length(self, index: int) -> float:
        """h: the length of step `index` in lambda."""
        return self._lambdas[index + 1] - self._lambdas[index]

    def _previous_length(self, index: int) -> float:
        """The length of the step before, as a multiple of the length of step `index`."""
        return self._length(index - 1) / self._length(index)


def _parabola_weights(length: float, previous_length: float) -> tuple[float, float]:
    """Weights of the slope behind a step and of the change across it, to average a parabola.

    The parabola a u + b u^2 has the slope a - b previous_length behind (from u = -previous_length
    to 0) and the change a + b across (from 0 to 1). Its average is a mean_u + b mean_u2, and that
    gives two equations for the weights. official: fm_solvers_unipc.py solves them as R rhos = b.
    """
    fraction = -math.expm1(-length)  # 1 - exp(-length): the sum of the point weights, times length
    mean_u = (1 - fraction / length) / fraction
    mean_u2 = (1 - 2 * mean_u * fraction / length) / fraction
    weight_slope = (mean_u - mean_u2) / (1 + previous_length)
    return weight_slope, mean_u - weight_slope


def _lambda(sigma: float) -> float:
    """ln((1 - sigma) / sigma), from -inf at sigma 1 to +inf at sigma 0."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
