"""The sampling loop: who denoises when, guidance, and what becomes of a given first frame."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
    random_tensor,
    randomise,
    relative_error,
)
from wanfit.engine.condition import Condition
from wanfit.engine.denoise import TextPair, denoise, draw_noise, expert_at, phases, route
from wanfit.engine.models.dit import Dit, Moment
from wanfit.engine.models.dit_rows import Workspace
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
    assert expert_at(spec.boundary, timestep) == expert


@pytest.mark.parametrize(("spec", "high_steps"), [(T2V_A14B, 26), (I2V_A14B, 15)])
def test_the_official_defaults_switch_after_the_official_step(
    spec: ModelSpec, high_steps: int
) -> None:
    """26 of 40 steps and 15 of 40: wan22-models.md 3.1."""
    sampling = spec.sampling
    schedule = make_schedule(sampling.solver, sampling.num_inference_steps, sampling.shift)
    experts = [expert_at(spec.boundary, timestep) for timestep in schedule.timesteps]
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
    ("high", "low", "passes"), [(1.0, 1.0, [1, 1]), (1.0, 2.0, [1, 2]), (0.0, 1.0, [2, 1])]
)
def test_uncond_is_left_out_of_the_phase_of_an_expert_that_is_not_guided(
    high: float, low: float, passes: list[int]
) -> None:
    found = phases(_request(TINY_T2V, guidance_high=high, guidance_low=low))
    assert [phase.passes for phase in found] == passes
    assert [phase.expert for phase in found] == ["high_noise", "low_noise"]


def test_a_boundary_that_was_asked_for_moves_the_switch() -> None:
    """From one where both experts have steps to one that no timestep reaches."""
    given = _request(TINY_T2V, boundary=0.95)
    assert [phase.expert for phase in phases(given)] == ["high_noise", "low_noise"]
    assert phases(given)[0].timesteps != phases(_request(TINY_T2V))[0].timesteps
    assert [phase.expert for phase in phases(_request(TINY_T2V, boundary=1.0))] == ["low_noise"]


@torch.inference_mode()
def test_units_are_asked_for_along_the_route() -> None:
    """What the streamer prefetches is what comes, in that order, also across the experts."""
    request = _request(TINY_T2V, guidance_low=1.0)
    dits = _dits(TINY_T2V)
    asked: list[tuple[str, str]] = []
    for expert, dit in dits.items():
        names = {module: name for name, module in dit.named_modules()}

        def present(
            part: nn.Module, expert: Expert = expert, names: dict[nn.Module, str] = names
        ) -> AbstractContextManager[None]:
            asked.append((expert, names[part]))
            return nullcontext()

        dit.present = present
    _denoised(request, _noise(request), dits)
    assert asked == list(route(request))


@torch.inference_mode()
def test_each_step_is_guided_by_its_own_expert() -> None:
    """Euler by hand: v_u + g (v_c - v_u) from the expert of that timestep, with its guidance."""
    request = _request(TINY_T2V, solver="euler", guidance_high=4.0, guidance_low=1.5)
    dits = _dits(TINY_T2V)
    latents = noise = _noise(request)
    schedule = make_schedule("euler", request.num_inference_steps, request.shift)
    experts = []
    for i, timestep in enumerate(schedule.timesteps):
        experts.append(expert_at(TINY_T2V.boundary, timestep))
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
def test_a_given_first_frame_stays_and_is_seen_at_time_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is exact at the end, and what the network sees is that frame, clean, at every step."""
    request = _request(TINY_TI2V, solver="unipc")
    given = random_tensor(1, 4, 1, 4, 8, seed=5)
    seen: list[tuple[Tensor, Moment]] = []
    dits = _dits(TINY_TI2V)
    dit = dits["high_noise"]
    clean = dit.embed_times(torch.zeros(1, 1))
    _watch(dit, lambda latents, moment: seen.append((latents, moment)), monkeypatch)
    latents = _denoised(request, _noise(request), dits, condition=Condition(first_frame=given))
    assert torch.equal(latents[:, :, :1], given)
    assert len(seen) == 2 * request.num_inference_steps
    for x, moment in seen:
        assert torch.equal(x[:, :, :1], given)
        assert moment.modulation.shape[1] == 3
        assert torch.allclose(moment.modulation[:, 0], clean.modulation[:, 0], atol=1e-6)
        assert torch.equal(moment.modulation[:, 1], moment.modulation[:, 2])
        assert not torch.allclose(moment.modulation[:, 1], clean.modulation[:, 0], atol=1e-3)


@torch.inference_mode()
def test_image_channels_are_joined_behind_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request(TINY_I2V)
    channels = random_tensor(1, 8, 3, 4, 8, seed=6)
    seen: list[Tensor] = []
    dits = _dits(TINY_I2V)
    for dit in dits.values():
        _watch(dit, lambda latents, moment: seen.append(latents), monkeypatch)
    noise = _noise(request)
    _denoised(request, noise, dits, condition=Condition(channels=channels))
    assert torch.equal(seen[0][:, :4], noise)
    assert all(torch.equal(x[:, 4:], channels) for x in seen)


@torch.inference_mode()
def test_every_step_is_told() -> None:
    request = _request(TINY_TI2V)
    dits = _dits(TINY_TI2V)
    steps = list(denoise(request, _noise(request), TEXT, Condition(), dits, _work(request)))
    assert steps == [StepDone("denoise", i, 6) for i in range(1, 7)]


def _request(spec: ModelSpec, solver: Solver = "unipc", **guidance: Any) -> ResolvedRequest:
    request = VideoRequest(
        prompt="", width=128 if spec is TINY_TI2V else 64, height=64 if spec is TINY_TI2V else 32,
        num_frames=9, num_inference_steps=6, solver=solver, seed=3, **guidance,
    )  # fmt: skip
    image_size = (64, 32) if spec.needs_image else None
    return resolve(request, spec, image_size=image_size)


def _work(request: ResolvedRequest) -> Workspace:
    dit = request.spec.dit
    geometry = geometry_of(request.spec, request.width, request.height, request.num_frames)
    return Workspace(
        dit, geometry.num_tokens, dtype=torch.float32, device=torch.device("cpu"), rows=16, heads=1
    )


def _watch(
    dit: Dit, tell: Callable[[Tensor, Moment], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tells what each forward sees."""
    real = dit.velocity

    def velocity(latents: Tensor, moment: Moment, text: Tensor, work: Workspace) -> Tensor:
        tell(latents, moment)
        return real(latents, moment, text, work)

    monkeypatch.setattr(dit, "velocity", velocity)


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
    steps = denoise(request, noise, text, condition, dits, _work(request))
    while True:
        try:
            next(steps)
        except StopIteration as done:
            latents: Tensor = done.value
            return latents
