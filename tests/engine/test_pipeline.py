"""The events of one generation, and what the pipeline leaves to its caller."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.plans import hand_made_plan
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V, TinyModel, write_tiny
from wanfit.engine.condition import prepare_image
from wanfit.engine.decode import to_uint8
from wanfit.engine.pipeline import generate_frames
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.events import FramesReady, Notice, StageBegan, StepDone
from wanfit.plan.plan import Precision
from wanfit.request import VideoRequest, resolve
from wanfit.specs import ModelSpec

CPU = torch.device("cpu")
SIZES = {"tiny-ti2v": (64, 64), "tiny-t2v": (32, 48), "tiny-i2v": (48, 32)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    root = tmp_path_factory.mktemp("models")
    specs = (TINY_TI2V, TINY_T2V, TINY_I2V)
    return {spec.name: write_tiny(root / spec.name, spec, seed=5) for spec in specs}


@pytest.mark.parametrize(
    ("name", "with_image"),
    [("tiny-ti2v", False), ("tiny-ti2v", True), ("tiny-t2v", False), ("tiny-i2v", True)],
)
def test_events_come_in_the_order_of_the_stages(
    name: str, with_image: bool, models: dict[str, TinyModel]
) -> None:
    """Stages, their steps counted as announced, and frames chunk by chunk while decoding."""
    image = _image(*SIZES[name]) if with_image else None
    events = list(_events(models[name], image=image, num_frames=9))
    stages = [event.stage for event in events if isinstance(event, StageBegan)]
    assert stages == ["text", *(["image"] if with_image else []), "denoise", "decode"]
    current: StageBegan | None = None
    for event in events:
        if isinstance(event, StageBegan):
            current = event
        elif isinstance(event, StepDone):
            assert current is not None
            assert (event.stage, event.steps) == (current.stage, current.steps)
        elif isinstance(event, FramesReady):
            assert current is not None
            assert current.stage == "decode"
    steps = [event for event in events if isinstance(event, StepDone)]
    for stage, group in groupby(steps, key=lambda step: step.stage):
        assert [step.step for step in group] == list(range(1, 5 if stage == "denoise" else 4))
    chunks = [event.frames for event in events if isinstance(event, FramesReady)]
    assert [chunk.shape[0] for chunk in chunks] == [1, 4, 4]
    width, height = SIZES[name]
    assert all(chunk.shape[1:] == (height, width, 3) for chunk in chunks)
    assert all(chunk.dtype == np.uint8 for chunk in chunks)


def test_the_same_seed_gives_the_same_clip_and_another_another(
    models: dict[str, TinyModel],
) -> None:
    model = models["tiny-t2v"]
    first, again, other = (_frames(_events(model, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_first_frame_is_the_image_as_the_vae_sees_it(models: dict[str, TinyModel]) -> None:
    """TI2V: frame 0 is decode(encode(image)), untouched by the denoising."""
    model, image = models["tiny-ti2v"], _image(64, 64)
    frames = _frames(_events(model, image=image, num_frames=9))
    with torch.inference_mode():
        pixels = prepare_image(image, "ti2v", 64, 64)
        seen = next(iter(model.vae.decode(model.vae.encode(pixels[None, :, None]))))
    assert np.array_equal(frames[:1], to_uint8(seen))


def test_inference_mode_does_not_leak_to_the_caller(models: dict[str, TinyModel]) -> None:
    """Between any two events the caller can train; also after stopping early or an error."""
    events = _events(models["tiny-ti2v"], image=_image(64, 64))
    for _ in events:
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    stopped = _events(models["tiny-t2v"])
    next(stopped)
    stopped.close()
    assert not torch.is_inference_mode_enabled()


def test_words_that_the_model_does_not_know_are_told_before_any_work(
    models: dict[str, TinyModel],
) -> None:
    """Of both prompts, each once, while the clip is still made."""
    events = list(
        _events(models["tiny-t2v"], prompt="a red zebra, a Zebra", negative_prompt="blurry zebra")
    )
    assert events[1] == Notice("The model does not know: zebra, Zebra, blurry")
    assert _frames(iter(events)).shape[0] == 5


def test_a_negative_prompt_without_use_is_not_read(models: dict[str, TinyModel]) -> None:
    """With both guidances at 1 its words cannot matter, so nothing is said about them."""
    events = _events(
        models["tiny-t2v"], negative_prompt="zebra", guidance_high=1.0, guidance_low=1.0
    )
    assert not [event for event in events if isinstance(event, Notice)]


def test_a_prompt_beyond_512_tokens_is_cut_and_said_so(models: dict[str, TinyModel]) -> None:
    events = _events(models["tiny-t2v"], prompt="red " * 520)
    notices = [event for event in events if isinstance(event, Notice)]
    assert notices == [Notice("The model reads 512 tokens; the last 9 are left out")]


def test_bf16_gives_nearly_the_clip_of_fp32(models: dict[str, TinyModel]) -> None:
    model = models["tiny-t2v"]
    exact = _frames(_events(model, precision="fp32")).astype(float)
    rounded = _frames(_events(model, precision="bf16")).astype(float)
    assert 0 < np.abs(exact - rounded).mean() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("value", "level"), [(-1.0, 0), (1.0, 255), (0.0, 127), (-3.0, 0), (3.0, 255), (0.9999, 254)]
)
def test_levels_are_truncated_and_clamped(value: float, level: int) -> None:
    """As both references write them; 0 is 127.5, which becomes 127."""
    pixels = to_uint8(torch.full((1, 3, 2, 4, 6), value))
    assert pixels.shape == (2, 4, 6, 3)
    assert set(pixels.flatten().tolist()) == {level}


def _request(spec: ModelSpec, **fields: Any) -> VideoRequest:
    width, height = SIZES[spec.name]
    defaults: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "width": width,
        "height": height,
        "num_frames": 5,
        "num_inference_steps": 4,
        "seed": 1,
    }
    return VideoRequest(**defaults | fields)


def _events(
    model: TinyModel,
    *,
    image: Image.Image | None = None,
    precision: Precision = "fp32",
    **fields: Any,
) -> Any:
    request = resolve(
        _request(model.spec, **fields), model.spec, image_size=None if image is None else image.size
    )
    plan = hand_made_plan(request, where="registered", precision=precision)
    return generate_frames(plan, open_model(model.path, model.spec), image, Depot(CPU))


def _frames(events: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.concatenate([event.frames for event in events if isinstance(event, FramesReady)])


def _image(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)
