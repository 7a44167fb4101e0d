"""The sampling loop: who denoises when, guidance, and what becomes of a given first frame."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
    random_tensor,
    randomise,
    relative_error,
)
from wanfit.engine.condition import Condition
from wanfit.engine.denoise import TextPair, denoise, draw_noise, expert_at, needs_uncond
from wanfit.engine.models.dit import Dit
from wanfit.engine.schedule import make_schedule
from wanfit.events import StepDone
from wanfit.geometry import geometry_of
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, Expert, ModelSpec, Solver

TEXT = TextPair(random_tensor(1, 12, 24, seed=1), random_tensor(1, 12, 24, seed=2))


@pytest.mark.parametrize(
    ("spec", "timestep", "expert"),
    [
        (T2V_A14B, 875.0, "high_noise"),
        (T2V_A14B, 874.0, "low_noise"),
        (I2V_A14B, 900.0, "high_noise"),
        (I2V_A14B, 899.0, "low_noise"),
        (TI2V_5B, 999.0, "high_noise"),
        (TI2V_5B, 92.0, "high_noise"),
    ],
)
def test_the_boundary_belongs_to_high_noise(spec: ModelSpec, timestep: float, expert: str) -> None:
    """And a dense model has one expert for all."""
    assert expert_at(spec, timestep) == expert


@pytest.mark.parametrize(("spec", "high_steps"), [(T2V_A14B, 26), (I2V_A14B, 15)])
def test_the_official_defaults_switch_after_the_official_step(
    spec: ModelSpec, high_steps: int
) -> None:
    """26 of 40 steps and 15 of 40: wan22-models.md 3.1."""
    sampling = spec.sampling
    schedule = make_schedule(sampling.solver, sampling.num_inference_steps, sampling.shift)
    experts = [expert_at(spec, timestep) for timestep in schedule.timesteps]
    assert experts == ["high_noise"] * high_steps + ["low_noise"] * (40 - high_steps)


def test_noise_is_the_cpu_generator_s_in_channels_frames_rows_columns() -> None:
    """What diffusers draws from a CPU generator with the same seed."""
    geometry = geometry_of(TINY_T2V, 48, 32, 9)
    noise = draw_noise(geometry, seed=7)
    expected = torch.randn((1, 4, 3, 4, 6), generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise, expected)
    assert not torch.equal(noise, draw_noise(geometry, seed=8))
    assert torch.equal(draw_noise(geometry, seed=2**63 - 1), draw_noise(geometry, seed=2**63 - 1))


@pytest.mark.parametrize(
    ("high", "low", "needed"), [(1.0, 1.0, False), (1.0, 2.0, True), (0.0, 1.0, True)]
)
def test_uncond_is_left_out_only_when_no_expert_is_guided(
    high: float, low: float, needed: bool
) -> None:
    assert needs_uncond(_request(TINY_T2V, guidance_high=high, guidance_low=low)) is needed


@torch.inference_mode()
def test_each_step_is_guided_by_its_own_expert() -> None:
    """Euler by hand: v_u + g (v_c - v_u) from the expert of that timestep, with its guidance."""
    request = _request(TINY_T2V, solver="euler", guidance_high=4.0, guidance_low=1.5)
    dits = _dits(TINY_T2V)
    latents = noise = _noise(request)
    schedule = make_schedule("euler", request.num_inference_steps, request.shift)
    experts = []
    for i, timestep in enumerate(schedule.timesteps):
        experts.append(expert_at(TINY_T2V, timestep))
        guidance = 4.0 if experts[-1] == "high_noise" else 1.5
        cond, uncond = (dits[experts[-1]](latents, torch.tensor([timestep]), text) for text in TEXT)
        velocity = uncond + guidance * (cond - uncond)
        latents = latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity
    assert set(experts) == {"high_noise", "low_noise"}
    assert relative_error(_denoised(request, noise, dits), latents) < 1e-6


@torch.inference_mode()
def test_guidance_of_one_needs_no_uncond_and_gives_the_same() -> None:
    request = _request(TINY_T2V, guidance_high=1.0, guidance_low=1.0)
    nearly = replace(request, guidance_high=1.0000001, guidance_low=1.0000001)
    noise, dits = _noise(request), _dits(TINY_T2V)
    without = _denoised(request, noise, dits, TextPair(TEXT.cond, None))
    assert relative_error(without, _denoised(nearly, noise, dits)) < 1e-5


@torch.inference_mode()
def test_a_given_first_frame_stays_and_is_seen_at_time_zero() -> None:
    """It is exact at the end, and what the network sees is that frame, clean, at every step."""
    request = _request(TINY_TI2V, solver="unipc")
    given = random_tensor(1, 4, 1, 4, 8, seed=5)
    seen: list[tuple[Tensor, Tensor]] = []
    dits = _dits(TINY_TI2V)
    dits["high_noise"].register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    latents = _denoised(request, _noise(request), dits, condition=Condition(first_frame=given))
    assert torch.equal(latents[:, :, :1], given)
    assert len(seen) == 2 * request.num_inference_steps
    for x, timestep in seen:
        assert torch.equal(x[:, :, :1], given)
        assert timestep.shape == (1, 3)
        assert timestep[0, 0] == 0
        assert timestep[0, 1] == timestep[0, 2] > 0


@torch.inference_mode()
def test_image_channels_are_joined_behind_the_noise() -> None:
    request = _request(TINY_I2V)
    channels = random_tensor(1, 8, 3, 4, 8, seed=6)
    seen: list[Tensor] = []
    dits = _dits(TINY_I2V)
    for dit in dits.values():
        dit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noise = _noise(request)
    _denoised(request, noise, dits, condition=Condition(channels=channels))
    assert torch.equal(seen[0][:, :4], noise)
    assert all(torch.equal(x[:, 4:], channels) for x in seen)


@torch.inference_mode()
def test_one_expert_is_let_go_before_the_next_is_loaded() -> None:
    """Each is loaded once, and at no time are two alive: an expert fills a card."""
    request = _request(TINY_T2V)
    alive: list[weakref.ref[Dit]] = []
    loaded: list[Expert] = []

    def load(expert: Expert) -> Dit:
        assert all(reference() is None for reference in alive)
        dit = randomise(Dit(TINY_T2V.dit), seed=1)
        alive.append(weakref.ref(dit))
        loaded.append(expert)
        return dit

    for _ in denoise(request, _noise(request), TEXT, Condition(), load):
        pass
    assert loaded == ["high_noise", "low_noise"]
    assert all(reference() is None for reference in alive)


@torch.inference_mode()
def test_every_step_is_told() -> None:
    request = _request(TINY_TI2V)
    dits = _dits(TINY_TI2V)
    steps = list(denoise(request, _noise(request), TEXT, Condition(), dits.__getitem__))
    assert steps == [StepDone("denoise", i, 6) for i in range(1, 7)]


def _request(spec: ModelSpec, solver: Solver = "unipc", **guidance: Any) -> ResolvedRequest:
    request = VideoRequest(
        prompt="", width=128 if spec is TINY_TI2V else 64, height=64 if spec is TINY_TI2V else 32,
        num_frames=9, num_inference_steps=6, solver=solver, seed=3, **guidance,
    )  # fmt: skip
    image_size = (64, 32) if spec.needs_image else None
    return resolve(request, spec, image_size=image_size)


def _noise(request: ResolvedRequest) -> Tensor:
    geometry = geometry_of(request.spec, request.width, request.height, request.num_frames)
    return draw_noise(geometry, request.seed)


def _dits(spec: ModelSpec) -> dict[Expert, Dit]:
    return {expert: randomise(Dit(spec.dit), seed=i) for i, expert in enumerate(spec.experts)}


def _denoised(
    request: ResolvedRequest,
    noise: Tensor,
    dits: dict[Expert, Dit],
    text: TextPair = TEXT,
    condition: Condition = Condition(),  # noqa: B008  frozen and empty
) -> Tensor:
    """What the generator returns when it is done."""
    steps = denoise(request, noise, text, condition, dits.__getitem__)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            latents: Tensor = done.value
            return latents
