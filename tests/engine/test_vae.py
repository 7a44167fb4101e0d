"""The autoencoder against diffusers' AutoencoderKLWan, with the same random weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.tiny_models import (
    random_tensor,
    randomise,
    reference_vae,
    relative_error,
    tiny_vae,
)
from wanfit.engine.models.tiles import blend_tiles
from wanfit.engine.models.vae import Vae
from wanfit.specs import VAE_21, VAE_22, VaeSpec

SPECS = {
    "2.1": tiny_vae(VAE_21),
    "2.1, 2 res blocks": tiny_vae(VAE_21, latent_channels=3, res_blocks=2),
    "2.2": tiny_vae(VAE_22),
    "2.2, 2 res blocks": tiny_vae(VAE_22, latent_channels=6, res_blocks=2),
    "2.2, other widths": tiny_vae(VAE_22, encoder_width=8, decoder_width=4),
}
FRAMES = [1, 5, 9, 17]  # the first chunk alone, one more, two more, and a long clip
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
each_generation = pytest.mark.parametrize("spec", [SPECS["2.1"], SPECS["2.2"]], ids=["2.1", "2.2"])


@pytest.mark.parametrize("num_frames", FRAMES)
@each_spec
def test_latents_equal_those_of_diffusers(spec: VaeSpec, num_frames: int) -> None:
    """Normalised latents of a clip of 3 x 2 latents a frame."""
    vae = randomise(Vae(spec), seed=1)
    frames = _frames(spec, num_frames)
    with torch.inference_mode():
        expected = _reference_latents(reference_vae(vae), vae, frames)
        latents = vae.encode(frames)
    assert latents.shape == (1, spec.latent_channels, (num_frames + 3) // 4, 3, 2)
    assert relative_error(latents, expected) < 1e-5


@pytest.mark.parametrize("num_frames", FRAMES)
@each_spec
def test_frames_equal_those_of_diffusers(spec: VaeSpec, num_frames: int) -> None:
    vae = randomise(Vae(spec), seed=2)
    latents = _latents(spec, num_frames)
    with torch.inference_mode():
        expected = _reference_frames(reference_vae(vae), vae, latents)
        chunks = list(vae.decode(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, *[4] * ((num_frames - 1) // 4)]
    assert relative_error(torch.cat(chunks, dim=2), expected) < 1e-5


@each_generation
def test_streamed_equals_whole(spec: VaeSpec) -> None:
    """Chunks with a history give what one pass over the clip without one gives, both ways."""
    vae = randomise(Vae(spec), seed=3)
    frames, latents = _frames(spec, 13), _latents(spec, 13)
    with torch.inference_mode():
        mean = vae.mean(frames, None, first=True)
        assert relative_error(vae.encode(frames), vae.normalise(mean)) < 1e-5
        whole = vae.pixels(vae.denormalise(latents), None, first=True).clamp(-1, 1)
        assert relative_error(torch.cat(list(vae.decode(latents)), dim=2), whole) < 1e-5


@each_generation
def test_later_frames_do_not_change_earlier_ones(spec: VaeSpec) -> None:
    """Causality, by encoding and decoding a longer clip with the same beginning."""
    vae = randomise(Vae(spec), seed=4)
    frames, latents = _frames(spec, 13), _latents(spec, 13)
    with torch.inference_mode():
        assert relative_error(vae.encode(frames)[:, :, :3], vae.encode(frames[:, :, :9])) < 1e-5
        longer = torch.cat(list(vae.decode(latents)), dim=2)
        shorter = torch.cat(list(vae.decode(latents[:, :, :3])), dim=2)
        assert relative_error(longer[:, :, :9], shorter) < 1e-5


@each_generation
def test_clips_of_a_batch_do_not_mix(spec: VaeSpec) -> None:
    vae = randomise(Vae(spec), seed=5)
    frames = torch.cat([_frames(spec, 5), _frames(spec, 5).flip(3)])
    with torch.inference_mode():
        batch = vae.encode(frames)
        assert relative_error(batch[1:], vae.encode(frames[1:])) < 1e-5
        pixels = torch.cat(list(vae.decode(batch)), dim=2)
        alone = torch.cat(list(vae.decode(batch[1:])), dim=2)
        assert relative_error(pixels[1:], alone) < 1e-5


@each_generation
def test_tiles_that_cover_everything_change_nothing(spec: VaeSpec) -> None:
    """One tile as large as the picture is the plain decode and encode."""
    vae = randomise(Vae(spec), seed=6)
    frames, latents = _frames(spec, 5), _latents(spec, 5)
    tile_px = 3 * spec.stride_px
    with torch.inference_mode():
        tiled = torch.cat(list(vae.decode(latents, tile_px=tile_px)), dim=2)
        assert relative_error(tiled, torch.cat(list(vae.decode(latents)), dim=2)) < 1e-5
        assert relative_error(vae.encode(frames, tile_px=tile_px), vae.encode(frames)) < 1e-5


@pytest.mark.parametrize("size", [(12, 10), (7, 31), (16, 6)], ids=str)
def test_blended_tiles_have_no_seam(size: tuple[int, int]) -> None:
    """Tiles of 6 cells that disagree by 1 from one to the next blend without a jump.

    Each tile is one level, the next tile the other one. The blend falls over an overlap of at
    least one cell (8 pixels), so no two neighbouring pixels differ by more than 1 / 4 (a cut would
    be a jump of 1), and nothing lies outside the two levels.
    """
    levels = itertools.cycle([0.0, 1.0])
    x = torch.zeros(1, 1, 1, *size)
    blended = blend_tiles(
        lambda part: torch.full((1, 1, 1, *(8 * n for n in part.shape[3:])), next(levels)),
        x,
        tile=6,
        in_stride=1,
        out_stride=8,
    )
    assert blended.shape == (1, 1, 1, 8 * size[0], 8 * size[1])
    assert float(blended.min()) >= 0
    assert 0.5 < float(blended.max()) <= 1
    for axis in (3, 4):
        assert float(blended.diff(dim=axis).abs().max()) <= 0.25


@each_generation
def test_tiled_decode_stays_near_the_whole(spec: VaeSpec) -> None:
    """Tiles lack what lies beyond their edges, but land where they belong.

    A random decoder sees as far as its attention does, so the tiles cannot be equal to the whole;
    tiles put in the wrong place would not correlate with it at all.
    """
    vae = randomise(Vae(spec), seed=7)
    latents = random_tensor(1, spec.latent_channels, 2, 8, 7, seed=70)
    with torch.inference_mode():
        whole = torch.cat(list(vae.decode(latents)), dim=2)
        chunks = list(vae.decode(latents, tile_px=5 * spec.stride_px))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4]
    tiled = torch.cat(chunks, dim=2)
    assert 0 < relative_error(tiled, whole) < 0.7


@each_generation
def test_bf16_is_as_near_to_the_truth_as_diffusers_in_bf16(spec: VaeSpec) -> None:
    vae = randomise(Vae(spec), seed=8)
    for parameter in vae.parameters():
        parameter.copy_(parameter.bfloat16().float())
    frames, latents = _frames(spec, 9).bfloat16().float(), _latents(spec, 9)
    with torch.inference_mode():
        truth, theirs = (
            (
                _reference_latents(reference, vae, frames),
                _reference_frames(reference, vae, latents),
            )
            for reference in (reference_vae(vae, dtype=d) for d in (torch.float64, torch.bfloat16))
        )
        vae.bfloat16()
        ours = vae.encode(frames), torch.cat(list(vae.decode(latents)), dim=2)
    for mine, reference, exact in zip(ours, theirs, truth, strict=True):
        assert relative_error(mine, exact) <= 2 * relative_error(reference, exact)


def _frames(spec: VaeSpec, num_frames: int) -> Tensor:
    side = spec.stride_px
    return random_tensor(1, 3, num_frames, 3 * side, 2 * side, seed=num_frames).clamp(-1, 1)


def _latents(spec: VaeSpec, num_frames: int) -> Tensor:
    return random_tensor(1, spec.latent_channels, (num_frames + 3) // 4, 3, 2, seed=num_frames)


def _reference_latents(reference: Any, vae: Vae, frames: Tensor) -> Tensor:
    """diffusers leaves the normalisation to its pipelines: ours is used, the same formula."""
    dtype = reference.dtype
    mean: Tensor = reference.encode(frames.to(dtype)).latent_dist.mode()
    return vae.normalise(mean)


def _reference_frames(reference: Any, vae: Vae, latents: Tensor) -> Tensor:
    raw = vae.denormalise(latents).to(reference.dtype)
    frames: Tensor = reference.decode(raw, return_dict=False)[0]
    return frames
