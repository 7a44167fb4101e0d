"""Noise to latents: the sampling loop, with its two experts, guidance and the image's condition.

Latents, guidance and solver are fp32 whatever the dtype of the transformer. Cond and uncond run
one after the other, as official: half the activations of running them as one batch.

Dims: B batch (1), C channels, T latent frames, H W latent sides, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfit.engine.condition import Condition
from wanfit.engine.models.dit import Dit, Moment
from wanfit.engine.models.dit_rows import Workspace
from wanfit.engine.preview import Colours, preview
from wanfit.engine.schedule import make_schedule, make_solver
from wanfit.engine.weights.stream import Visit
from wanfit.events import Preview, StepDone
from wanfit.geometry import Geometry
from wanfit.plan.weights import ONCE_UNITS, block_names
from wanfit.request import ResolvedRequest
from wanfit.specs import NUM_TRAIN_TIMESTEPS, Expert


class TextPair(NamedTuple):
    """The two texts of guidance, each [1, S, D]."""

    cond: Tensor
    uncond: Tensor | None  # None when no expert is guided


class Phase(NamedTuple):
    """Steps that one expert takes, one after the other."""

    expert: Expert
    guidance: float
    timesteps: tuple[float, ...]

    @property
    def passes(self) -> int:
        """Forwards of a step. v_u + 1 (v_c - v_u) is v_c: guidance 1 needs no uncond pass."""
        return 1 if self.guidance == 1 else 2


def draw_noise(geometry: Geometry, seed: int) -> Tensor:
    """[1, C, T, H, W] fp32, drawn on the CPU, so that a seed means the same clip on every card."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(geometry.latent_shape, generator=generator).unsqueeze(0)


def expert_at(boundary: float | None, timestep: float) -> Expert:
    """Who denoises at this timestep. official: text2video.py, _prepare_model_for_timestep."""
    if boundary is None or timestep >= boundary * NUM_TRAIN_TIMESTEPS:
        return "high_noise"
    return "low_noise"


def guidance_of(request: ResolvedRequest, expert: Expert) -> float:
    """The guidance that the request sets for an expert; a dense model reads the high one."""
    return request.guidance_high if expert == "high_noise" else request.guidance_low


def phases(request: ResolvedRequest) -> list[Phase]:
    """Who denoises when: one phase for each expert that has a step."""
    found: list[Phase] = []
    schedule = make_schedule(request.solver, request.num_inference_steps, request.shift)
    for timestep in schedule.timesteps:
        expert = expert_at(request.boundary, timestep)
        if not found or found[-1].expert != expert:
            found.append(Phase(expert, guidance_of(request, expert), ()))
        found[-1] = found[-1]._replace(timesteps=(*found[-1].timesteps, timestep))
    return found


def route(request: ResolvedRequest) -> Iterator[Visit]:
    """The units that `denoise` asks for, in its order: what the streamer prefetches along."""
    blocks = block_names(request.spec.dit.num_blocks)
    for phase in phases(request):
        for unit in ONCE_UNITS:
            yield phase.expert, unit
        for _ in range(len(phase.timesteps) * phase.passes):
            for block in blocks:
                yield phase.expert, block


def denoise(
    request: ResolvedRequest,
    noise: Tensor,
    text: TextPair,
    condition: Condition,
    dits: Mapping[Expert, Dit],
    work: Workspace,
    colours: Colours | None = None,
) -> Generator[StepDone | Preview, None, Tensor]:
    """Yields StepDone after every step and returns the clean latents, fp32 as `noise` is.

    noise: [1, C, T, H, W]. The solver's memory carries over from one expert to the other. What
    depends on the text or on the time alone is computed once per phase, not once per step.
    colours: how latents look, for a Preview of every step; None: nobody looks.
    """
    schedule = make_schedule(request.solver, request.num_inference_steps, request.shift)
    solver = make_solver(request.solver, schedule)
    latents = _with_first_frame(noise, condition)
    step = 0
    for phase in phases(request):
        dit = dits[phase.expert]
        guide = _Guide(dit, phase, text, condition, work, latents.device)
        for i in range(len(phase.timesteps)):
            velocity = guide.velocity(latents, i)
            if colours is not None:
                frame = _seen(latents, velocity, schedule.sigmas[step], colours)
                yield Preview(step + 1, request.num_inference_steps, frame)
            # The solver moves the given first frame too; it is put back, clean, before every use.
            latents = _with_first_frame(solver.step(velocity, latents), condition)
            step += 1
            yield StepDone("denoise", step, request.num_inference_steps)
    return latents


class _Guide:
    """One expert with what stays the same during its phase."""

    def __init__(
        self,
        dit: Dit,
        phase: Phase,
        text: TextPair,
        condition: Condition,
        work: Workspace,
        device: torch.device,
    ) -> None:
        self._dit, self._work, self._condition = dit, work, condition
        self._guidance = phase.guidance
        texts = [text.cond]
        if phase.passes > 1:
            assert text.uncond is not None, "guidance needs the uncond text"
            texts.append(text.uncond)
        self._texts = dit.embed_texts(texts)
        # The last one is that of a frame without noise.
        self._moments = dit.embed_times(
            torch.tensor([*phase.timesteps, 0.0], device=device).unsqueeze(1)
        )

    def velocity(self, latents: Tensor, i: int) -> Tensor:
        """v_u + guidance (v_c - v_u), fp32 [1, C, T, H, W]; v_c alone when guidance is 1."""
        x = latents
        if self._condition.channels is not None:
            x = torch.cat([latents, self._condition.channels], dim=1)
        moment = self._moment(i, latents.shape[2])
        cond, *uncond = (self._dit.velocity(x, moment, text, self._work) for text in self._texts)
        return uncond[0] + self._guidance * (cond - uncond[0]) if uncond else cond

    def _moment(self, i: int, num_frames: int) -> Moment:
        """That of step i; with a given first frame one for each latent frame, clean at first."""
        now = Moment(*(part[i : i + 1] for part in self._moments))
        if self._condition.first_frame is None:
            return now
        return Moment(
            *(
                torch.cat([part[-1:], *[part[i : i + 1]] * (num_frames - 1)], dim=1)
                for part in self._moments
            )
        )


def _seen(
    latents: Tensor, velocity: Tensor, sigma: float, colours: Colours
) -> npt.NDArray[np.uint8]:
    """The middle of the clip as the step predicts it, [H, W, 3]; no later frame is computed."""
    until = latents.shape[2] // 2 + 1
    return preview(latents[:, :, :until] - sigma * velocity[:, :, :until], colours)


def _with_first_frame(latents: Tensor, condition: Condition) -> Tensor:
    if condition.first_frame is None:
        return latents
    return torch.cat([condition.first_frame, latents[:, :, 1:]], dim=2)
