"""Noise to latents: the sampling loop, with its two experts, guidance and the image's condition.

Latents, guidance and solver are fp32 whatever the dtype of the transformer. Cond and uncond run
one after the other, as official: half the activations of running them as one batch.

Dims: B batch (1), C channels, T latent frames, H W latent sides, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from wanfit.engine.condition import Condition
from wanfit.engine.models.dit import Dit
from wanfit.engine.schedule import make_schedule, make_solver
from wanfit.events import StepDone
from wanfit.geometry import Geometry
from wanfit.request import ResolvedRequest
from wanfit.specs import NUM_TRAIN_TIMESTEPS, Expert, ModelSpec


class TextPair(NamedTuple):
    """The two texts of guidance, each [1, S, D]."""

    cond: Tensor
    uncond: Tensor | None  # None when no expert is guided


def draw_noise(geometry: Geometry, seed: int) -> Tensor:
    """[1, C, T, H, W] fp32, drawn on the CPU, so that a seed means the same clip on every card."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(geometry.latent_shape, generator=generator).unsqueeze(0)


def expert_at(spec: ModelSpec, timestep: float) -> Expert:
    """Who denoises at this timestep. official: text2video.py, _prepare_model_for_timestep."""
    if spec.boundary is None or timestep >= spec.boundary * NUM_TRAIN_TIMESTEPS:
        return "high_noise"
    return "low_noise"


def guidance_of(request: ResolvedRequest, expert: Expert) -> float:
    """The guidance that the request sets for an expert; a dense model reads the high one."""
    return request.guidance_high if expert == "high_noise" else request.guidance_low


def needs_uncond(request: ResolvedRequest) -> bool:
    """False when every expert's guidance is 1: v_u + 1 (v_c - v_u) is v_c, so v_u is not needed."""
    return any(guidance_of(request, expert) != 1 for expert in request.spec.experts)


def denoise(
    request: ResolvedRequest,
    noise: Tensor,
    text: TextPair,
    condition: Condition,
    load_dit: Callable[[Expert], Dit],
) -> Generator[StepDone, None, Tensor]:
    """Yields StepDone after every step and returns the clean latents, fp32 as `noise` is.

    noise: [1, C, T, H, W]. One expert is held at a time: `load_dit` is called when another is due,
    after the one before was let go. The solver's memory carries over from one to the other.
    """
    schedule = make_schedule(request.solver, request.num_inference_steps, request.shift)
    solver = make_solver(request.solver, schedule)
    latents = _with_first_frame(noise, condition)
    dit: Dit | None = None
    loaded: Expert | None = None
    for step, timestep in enumerate(schedule.timesteps, start=1):
        expert = expert_at(request.spec, timestep)
        if dit is None or expert != loaded:
            dit = None  # before the next is loaded: two would not fit
            dit, loaded = load_dit(expert), expert
        velocity = _guided_velocity(
            dit, latents, timestep, text, condition, guidance_of(request, expert)
        )
        # The solver moves the given first frame too; it is put back, clean, before every use.
        latents = _with_first_frame(solver.step(velocity, latents), condition)
        yield StepDone("denoise", step, len(schedule.timesteps))
    return latents


def _guided_velocity(
    dit: Dit,
    latents: Tensor,
    timestep: float,
    text: TextPair,
    condition: Condition,
    guidance: float,
) -> Tensor:
    """v_u + guidance (v_c - v_u), fp32 [1, C, T, H, W]; v_c alone when guidance is 1."""
    x = latents
    if condition.channels is not None:
        x = torch.cat([latents, condition.channels], dim=1)
    times = _times(latents, timestep, condition)
    cond: Tensor = dit(x, times, text.cond)
    if guidance == 1:
        return cond
    assert text.uncond is not None, "guidance needs the uncond text"
    uncond: Tensor = dit(x, times, text.uncond)
    return uncond + guidance * (cond - uncond)


def _times(latents: Tensor, timestep: float, condition: Condition) -> Tensor:
    """[1], or [1, T] with 0 for a given first frame: it has no noise left."""
    if condition.first_frame is None:
        return torch.full((1,), timestep, device=latents.device)
    times = torch.full((1, latents.shape[2]), timestep, device=latents.device)
    times[:, 0] = 0
    return times


def _with_first_frame(latents: Tensor, condition: Condition) -> Tensor:
    if condition.first_frame is None:
        return latents
    return torch.cat([condition.first_frame, latents[:, :, 1:]], dim=2)
