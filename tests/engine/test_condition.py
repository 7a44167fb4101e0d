"""What an image becomes: pixels resized as official, then channels or a clean first frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.tiny_models import TINY_I2V, TINY_TI2V, randomise
from wanfit.engine.condition import condition_on, prepare_image
from wanfit.engine.models.vae import Vae
from wanfit.geometry import geometry_of


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_an_image_of_the_clip_s_size_is_not_resampled(task: str) -> None:
    """Each value is level / 255, from [0, 1] to [-1, 1], in the order C, H, W."""
    image = _noise(48, 32)
    pixels = prepare_image(image, task, 48, 32)  # type: ignore[arg-type]
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels, levels / 127.5 - 1, atol=1e-6)


def test_i2v_stretches_the_whole_image() -> None:
    """All four corners stay, whatever becomes of the shape; bicubic overshoot is kept."""
    pixels = prepare_image(_quarters(40, 40), "i2v", 96, 32)
    assert pixels.shape == (3, 32, 96)
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.allclose(corners.T, _quarter_values(), atol=1e-5)
    assert pixels.max() > 1.01, "bicubic overshoots at an edge, and the official code keeps that"


def test_ti2v_covers_and_cuts_the_middle() -> None:
    """The repository's example, 832x1104 for 800x1088: to 820x1088, then 10 columns off each side.

    The size and the cut are from the fact sheet (wan22-models.md 5.4).
    """
    image = _noise(832, 1104)
    pixels = prepare_image(image, "ti2v", 800, 1088)
    resized = image.resize((820, 1088), Image.Resampling.LANCZOS)
    expected = np.array(resized)[:, 10:810]
    assert pixels.shape == (3, 1088, 800)
    levels = ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, expected)


@pytest.mark.parametrize("size", [(33, 97), (200, 64), (64, 64), (1, 500)], ids=str)
@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_any_image_comes_out_at_the_clip_s_size(task: str, size: tuple[int, int]) -> None:
    pixels = prepare_image(_noise(*size), task, 64, 96)  # type: ignore[arg-type]
    assert pixels.shape == (3, 96, 64)
    assert bool(torch.isfinite(pixels).all())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (64, 64), (255, 255, 255)).convert(mode)
    assert torch.equal(prepare_image(image, "ti2v", 64, 64), torch.ones(3, 64, 64))


def test_i2v_has_four_mask_channels_and_the_latents_of_image_and_grey() -> None:
    """The mask is 1 in the first latent frame alone; the rest of the clip is 0 in [-1, 1]."""
    vae = randomise(Vae(TINY_I2V.vae), seed=1)
    geometry = geometry_of(TINY_I2V, 48, 32, 9)
    pixels = prepare_image(_noise(48, 32), "i2v", 48, 32)
    condition = condition_on(pixels, "i2v", geometry, vae)
    assert condition.first_frame is None
    assert condition.channels is not None
    assert condition.channels.shape == (1, 8, *geometry.latent_shape[1:])
    mask, latents = condition.channels.split(4, dim=1)
    assert torch.equal(mask[:, :, 0], torch.ones_like(mask[:, :, 0]))
    assert torch.equal(mask[:, :, 1:], torch.zeros_like(mask[:, :, 1:]))
    clip = torch.zeros(1, 3, 9, 32, 48)
    clip[0, :, 0] = pixels
    assert torch.equal(latents, vae.encode(clip))


def test_ti2v_has_the_clean_latents_of_the_image_alone() -> None:
    vae = randomise(Vae(TINY_TI2V.vae), seed=1)
    geometry = geometry_of(TINY_TI2V, 64, 32, 9)
    pixels = prepare_image(_noise(64, 32), "ti2v", 64, 32)
    condition = condition_on(pixels, "ti2v", geometry, vae)
    assert condition.channels is None
    assert condition.first_frame is not None
    assert torch.equal(condition.first_frame, vae.encode(pixels[None, :, None]))
    assert condition.first_frame.shape == (1, 4, 1, 2, 4)


def _noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def _quarter_values() -> torch.Tensor:
    """[4, 3]: red, green, blue and white, in [-1, 1]."""
    return torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])


def _quarters(width: int, height: int) -> Image.Image:
    """Red and green above blue and white."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    image.paste("white", (width // 2, height // 2, width, height))
    return image
