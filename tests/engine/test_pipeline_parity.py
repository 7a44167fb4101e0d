"""From prompt to frames, against diffusers' pipelines reading the same directory.

diffusers' scheduler is given the official grid of sigmas (`set_timesteps(sigmas=...)`), since its
own grid is another one; all else is as `from_pretrained` makes it from what `write_directory`
wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.engine.plans import hand_made_plan
from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
    TinyModel,
    reference_class,
    write_tiny,
)
from wanfit.engine.denoise import expert_at
from wanfit.engine.pipeline import generate_frames
from wanfit.engine.schedule import make_schedule
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.events import FramesReady
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import ModelSpec

# diffusers and its libraries warn about themselves; none of it is about what we test.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "A red  circle, on a blue star &amp; moves left!"
NEGATIVE_PROMPT = "blue . right"
SPECS = {spec.name: spec for spec in (TINY_TI2V, TINY_T2V, TINY_I2V)}


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_high: float
    guidance_low: float
    with_image: bool = False
    shift: float | None = None


CASES = {
    "ti2v from text": Case("tiny-ti2v", 96, 64, 9, 5, 5.0, 5.0),
    "ti2v from an image": Case("tiny-ti2v", 64, 96, 9, 5, 4.0, 4.0, with_image=True),
    "ti2v, one frame": Case("tiny-ti2v", 96, 96, 1, 3, 2.0, 2.0, shift=3.0),
    "t2v, two experts": Case("tiny-t2v", 48, 80, 9, 6, 4.0, 3.0),
    "t2v without guidance": Case("tiny-t2v", 48, 48, 5, 4, 1.0, 1.0, shift=5.0),
    "i2v, two experts": Case("tiny-i2v", 80, 48, 13, 6, 3.5, 2.5, with_image=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny(root / name, spec, seed=9) for name, spec in SPECS.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_frames_equal_those_of_diffusers(case: Case, models: dict[str, TinyModel]) -> None:
    """More than 60 dB between the 8-bit frames, and both experts at work where there are two."""
    model = models[case.model]
    image = _image(case.width, case.height) if case.with_image else None
    request = _resolved(case, model.spec, image)
    assert _experts(request) == set(model.spec.experts)
    ours = _our_frames(model, request, image)
    theirs = _their_frames(model, request, image)
    assert ours.shape == (case.num_frames, case.height, case.width, 3)
    assert ours.std() > 10, "a blank clip would prove nothing"
    assert _psnr_db(ours, theirs) > 60


def test_the_comparison_sees_a_small_mistake(models: dict[str, TinyModel]) -> None:
    """The same clip with guidance 4.0 in place of 4.1 is below 60 dB, so the bar is not slack."""
    case = CASES["t2v, two experts"]
    model = models[case.model]
    request = _resolved(case, model.spec, None)
    ours = _our_frames(model, request, None)
    values = {name: getattr(request, name) for name in request.__slots__}
    theirs = _their_frames(model, ResolvedRequest(**values | {"guidance_high": 4.1}), None)
    assert _psnr_db(ours, theirs) < 60


def _resolved(case: Case, spec: ModelSpec, image: Image.Image | None) -> ResolvedRequest:
    request = VideoRequest(
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        width=case.width,
        height=case.height,
        num_frames=case.num_frames,
        num_inference_steps=case.steps,
        guidance_high=case.guidance_high,
        guidance_low=case.guidance_low,
        shift=case.shift,
        seed=1234,
    )
    return resolve(request, spec, image_size=None if image is None else image.size)


def _experts(request: ResolvedRequest) -> set[str]:
    schedule = make_schedule(request.solver, request.num_inference_steps, request.shift)
    return {expert_at(request.boundary, timestep) for timestep in schedule.timesteps}


def _our_frames(
    model: TinyModel, request: ResolvedRequest, image: Image.Image | None
) -> npt.NDArray[np.uint8]:
    plan = hand_made_plan(request, where="registered")  # streamed, as on a card
    depot = Depot(torch.device("cpu"))
    events = generate_frames(plan, open_model(model.path, model.spec), image, depot)
    return np.concatenate([event.frames for event in events if isinstance(event, FramesReady)])


def _their_frames(
    model: TinyModel, request: ResolvedRequest, image: Image.Image | None
) -> npt.NDArray[np.uint8]:
    name = "WanPipeline" if image is None else "WanImageToVideoPipeline"
    pipeline = reference_class("diffusers", name).from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)
    _give_official_grid(pipeline.scheduler, request.shift)
    arguments: dict[str, Any] = {} if image is None else {"image": image}
    if request.spec.boundary is not None:
        arguments["guidance_scale_2"] = request.guidance_low
    frames = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_high,
        generator=torch.Generator().manual_seed(request.seed),
        **arguments,
    ).frames[0]
    levels: npt.NDArray[np.uint8] = (frames * 255).astype(np.uint8)  # as its export_to_video does
    return levels


def _give_official_grid(scheduler: Any, shift: float) -> None:
    """sigmas 0.999 (1 - i/N); the scheduler applies its shift to them."""
    scheduler.register_to_config(flow_shift=shift)
    set_timesteps = scheduler.set_timesteps

    def official(num_inference_steps: int, device: Any = None) -> None:
        sigmas = 0.999 * (1 - np.arange(num_inference_steps) / num_inference_steps)
        set_timesteps(num_inference_steps, device=device, sigmas=sigmas)

    scheduler.set_timesteps = official


def _image(width: int, height: int) -> Image.Image:
    """A picture with edges and slopes, at the clip's size, so that nobody resamples it."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / width
    green = 255 * ((rows // 8 + columns // 8) % 2)
    blue = 255 * rows / height
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def _psnr_db(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
