"""The autoencoder against diffusers' AutoencoderKLWan, with the same random weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.tiny_models import (
    random_tensor,
    randomise,
    reference_vae,
    relative_error,
    tiny_vae,
)
from tests.live_bytes import CONVOLUTIONS
from wanfit.engine.decode import decode, decode_steps, to_uint8
from wanfit.engine.models.tiles import Strides, blend_tiles, join_bands
from wanfit.engine.models.vae import Vae
from wanfit.events import FramesReady, StepDone
from wanfit.plan.vae import tile_spans
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


# Where frames double and channels halve at once, the shortcut differs between the two frames.
NARROWING = tiny_vae(VAE_22, temporal_downsample=(True, True, False))


@pytest.mark.parametrize(
    "spec", [SPECS["2.1"], SPECS["2.2"], NARROWING], ids=["2.1", "2.2", "2.2, narrowing"]
)
def test_streamed_equals_whole(spec: VaeSpec) -> None:
    """Chunks with a history give what one pass over the clip without one gives, both ways."""
    vae = randomise(Vae(spec), seed=3)
    frames, latents = _frames(spec, 13), _latents(spec, 13)
    with torch.inference_mode():
        mean = vae.mean(frames, None, first=True)
        assert relative_error(vae.encode(frames), vae.normalise(mean)) < 1e-5
        whole = vae.pixels(vae.denormalise(latents), None, first=True).clamp(-1, 1)
        assert relative_error(torch.cat(list(vae.decode(latents)), dim=2), whole) < 1e-5


@pytest.mark.parametrize(
    "spec", [SPECS["2.1"], SPECS["2.2"], NARROWING], ids=["2.1", "2.2", "2.2, narrowing"]
)
def test_streamed_equals_whole_in_fp64(spec: VaeSpec) -> None:
    """To 1e-12, before anything is rounded to fp32: the stream differs in the order of sums."""
    vae = randomise(Vae(spec), seed=12).double()
    frames, latents = _frames(spec, 9).double(), _latents(spec, 9).double()
    with torch.inference_mode():
        history = vae.encoder.begin(1, *(n // spec.pixel_patch for n in frames.shape[3:]))
        chunks = frames.split([1, 4, 4], dim=2)
        means = [vae.mean(x, history, first=i == 0) for i, x in enumerate(chunks)]
        whole = vae.mean(frames, None, first=True)
        assert relative_error(torch.cat(means, dim=2), whole) < 1e-12
        history = vae.decoder.begin(1, *latents.shape[3:])
        parts = enumerate(latents.split(1, dim=2))
        pixels = [vae.pixels(x, history, first=i == 0) for i, x in parts]
        whole = vae.pixels(latents, None, first=True)
        assert relative_error(torch.cat(pixels, dim=2), whole) < 1e-12


@each_generation
def test_every_convolution_of_a_stream_is_channels_last(spec: VaeSpec) -> None:
    """Input and weight, so that nothing is copied into another order."""
    vae = randomise(Vae(spec), seed=13).requires_grad_(False)
    seen: list[list[bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in CONVOLUTIONS:
                last = torch.channels_last
                seen.append([x.is_contiguous(memory_format=last) for x in args[:2]])
            return func(*args, **(kwargs or {}))

    latents = random_tensor(1, spec.latent_channels, 3, 9, 7, seed=130)
    with torch.no_grad(), Watch():  # type: ignore[no-untyped-call]
        list(vae.decode(latents))
        vae.encode(_frames(spec, 9))
    assert len(seen) > 200
    assert all(x == [True, True] for x in seen)


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
        tiled = join_bands(vae.decode_tiles(latents, tile_px))
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

    def run(part: Tensor) -> Iterator[Tensor]:
        yield torch.full((1, 1, 1, *(8 * n for n in part.shape[3:])), next(levels))

    x = torch.zeros(1, 1, 1, *size)
    blended = join_bands(blend_tiles(run, x, 1, 6, Strides(into=1, out=8)))
    assert blended.shape == (1, 1, 1, 8 * size[0], 8 * size[1])
    assert float(blended.min()) >= 0
    assert 0.5 < float(blended.max()) <= 1
    for axis in (3, 4):
        assert float(blended.diff(dim=axis).abs().max()) <= 0.25


@pytest.mark.parametrize("size", [(12, 10), (7, 31), (9, 8), (3, 17)], ids=str)
def test_blending_is_the_weighted_mean_of_the_tiles(size: tuple[int, int]) -> None:
    """Against the mean taken at once over the whole picture, for two clips of random tiles.

    Tiles of 8 cells; some overlap by all but one row, which is the hard case for the bands.
    """
    stride, frames = 2, 3
    generator = torch.Generator().manual_seed(9)
    total = torch.zeros(2, 3, frames, size[0] * stride, size[1] * stride, dtype=torch.float64)
    weight = torch.zeros(total.shape[3:], dtype=torch.float64)
    spans = list(itertools.product(tile_spans(size[0], 8), tile_spans(size[1], 8)))
    tiles = iter(spans)

    def run(part: Tensor) -> Iterator[Tensor]:
        row, column = next(tiles)
        sides = [stride * n for n in part.shape[3:]]
        out = torch.randn(2, 3, frames, *sides, generator=generator)
        ramps = []
        for span, pixels, end in zip((row, column), sides, size, strict=True):
            middle = torch.arange(pixels, dtype=torch.float64) + 0.5
            left = middle if span.start else torch.full_like(middle, 1e9)
            right = middle.flip(0) if span.stop < end else torch.full_like(middle, 1e9)
            ramps.append((torch.minimum(left, right) / (2 * stride)).clamp(max=1))  # 8 / 4 cells
        where = [slice(span.start * stride, span.stop * stride) for span in (row, column)]
        total[:, :, :, where[0], where[1]] += out * torch.outer(*ramps)
        weight[where[0], where[1]] += torch.outer(*ramps)
        yield from out.split(2, dim=2)

    x = torch.zeros(2, 1, 1, *size)
    blended = join_bands(blend_tiles(run, x, frames, 8, Strides(into=1, out=stride)))
    assert relative_error(blended, total / weight) < 1e-6


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
        tiled = join_bands(vae.decode_tiles(latents, 5 * spec.stride_px))
    assert 0 < relative_error(tiled, whole) < 0.7


@pytest.mark.parametrize("tile", [None, 5], ids=["whole", "tiles"])
@each_generation
def test_decoding_counts_its_steps_and_gives_all_frames_in_order(
    spec: VaeSpec, tile: int | None
) -> None:
    """8 x 7 latents in tiles of 5 are 2 x 2 tiles; 3 latent frames are 9 frames, 4 at a time."""
    vae = randomise(Vae(spec), seed=10)
    latents = random_tensor(1, spec.latent_channels, 3, 8, 7, seed=100)
    tile_px = None if tile is None else tile * spec.stride_px
    with torch.inference_mode():
        events = list(decode(vae, latents, tile_px))
        if tile_px is None:
            frames = torch.cat(list(vae.decode(latents)), dim=2)
        else:
            frames = join_bands(vae.decode_tiles(latents, tile_px))
    steps = [event for event in events if isinstance(event, StepDone)]
    count = decode_steps(spec, latents.shape, tile_px)
    assert count == (3 if tile is None else 12)
    assert steps == [StepDone("decode", i, count) for i in range(1, count + 1)]
    chunks = [event.frames for event in events if isinstance(event, FramesReady)]
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert np.array_equal(np.concatenate(chunks), to_uint8(frames))


@each_generation
def test_gradients_of_a_whole_clip_equal_those_of_fp64(spec: VaeSpec) -> None:
    """Nothing is overwritten that autograd still needs, to the network's input and back."""
    vae = randomise(Vae(spec), seed=11)
    frames = _frames(spec, 5)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        vae = vae.to(dtype).requires_grad_(True)
        vae.zero_grad()
        x = frames.to(dtype)
        vae.pixels(vae.mean(x, None, first=True), None, first=True).square().mean().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    assert len(gradients[0]) == sum(1 for _ in vae.parameters())
    for low, high in zip(*gradients, strict=True):
        assert float((low - high).norm()) <= 1e-4 * float(high.norm()) + 1e-9


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
