"""Pixels to latents to tokens and back: every legal request, every illegal one, official sizes."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from wanfit.errors import BadFrameCount, BadSize, WanfitError
from wanfit.geometry import geometry_of, nearest_frame_counts, size_for_image
from wanfit.specs import DEMO, I2V_A14B, MODELS, ROPE_POSITIONS, T2V_A14B, TI2V_5B, ModelSpec

MOST_FRAMES = 4 * (ROPE_POSITIONS - 1) + 1  # 4093

specs = st.sampled_from(MODELS)
positions = st.integers(1, ROPE_POSITIONS)  # along one axis of the rotary table
any_number = st.one_of(st.integers(-40, 5000), st.integers(-(10**9), 10**9))


def numbers_in_hint(error: WanfitError) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", error.hint)]


@given(spec=specs, frames=positions, rows=positions, columns=positions)
def test_every_legal_clip_comes_back_from_its_latents(
    spec: ModelSpec, frames: int, rows: int, columns: int
) -> None:
    """Pixels and frames rebuilt from the latent shape, as the VAE does, are those asked for."""
    width, height, num_frames = columns * spec.grid_px, rows * spec.grid_px, 4 * (frames - 1) + 1
    clip = geometry_of(spec, width, height, num_frames)

    channels, latent_frames, latent_height, latent_width = clip.latent_shape
    assert channels == spec.vae.latent_channels
    assert 1 + (latent_frames - 1) * spec.vae.stride_frames == num_frames == clip.num_frames
    assert latent_height * spec.vae.stride_px == height == clip.height
    assert latent_width * spec.vae.stride_px == width == clip.width
    assert clip.num_tokens == frames * rows * columns


@given(spec=specs, num_frames=any_number)
@example(spec=DEMO, num_frames=0)
@example(spec=DEMO, num_frames=5000)
@example(spec=DEMO, num_frames=MOST_FRAMES + 4)
def test_every_illegal_frame_count_names_its_nearest_legal_neighbours(
    spec: ModelSpec, num_frames: int
) -> None:
    assume(not (1 <= num_frames <= MOST_FRAMES and num_frames % 4 == 1))
    with pytest.raises(BadFrameCount) as caught:
        geometry_of(spec, spec.grid_px, spec.grid_px, num_frames)

    assert str(num_frames) in caught.value.message
    named = numbers_in_hint(caught.value)
    for count in named:
        assert geometry_of(spec, spec.grid_px, spec.grid_px, count).num_frames == count
    assert_nearest(num_frames, named, step=4, first=1, last=MOST_FRAMES)


@given(spec=specs, pixels=any_number, side=st.sampled_from(["width", "height"]))
@example(spec=TI2V_5B, pixels=720, side="height")
@example(spec=TI2V_5B, pixels=ROPE_POSITIONS * 32 + 1, side="width")
def test_every_illegal_side_names_its_nearest_legal_neighbours(
    spec: ModelSpec, pixels: int, side: str
) -> None:
    grid, most = spec.grid_px, ROPE_POSITIONS * spec.grid_px
    assume(not (grid <= pixels <= most and pixels % grid == 0))
    good = {"width": grid, "height": grid}
    with pytest.raises(BadSize, match=f"A {side} of {pixels} px") as caught:
        geometry_of(spec, **(good | {side: pixels}), num_frames=1)

    assert spec.name in caught.value.message
    named = numbers_in_hint(caught.value)
    for neighbour in named:
        geometry_of(spec, **(good | {side: neighbour}), num_frames=1)
    assert_nearest(pixels, named, step=grid, first=grid, last=most)


def assert_nearest(value: int, named: list[int], *, step: int, first: int, last: int) -> None:
    """No legal number lies nearer to `value` than those named, on its side."""
    if value < first:
        assert named == [first]
    elif value > last:
        assert named == [last]
    else:
        below, above = named
        assert below < value < above == below + step


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [(80, (77, 81)), (81, (81, 81)), (82, (81, 85)), (1, (1, 1)), (0, (1, 1)), (-7, (1, 1))],
)
def test_nearest_frame_counts(asked: int, nearest: tuple[int, int]) -> None:
    assert nearest_frame_counts(asked) == nearest


@pytest.mark.parametrize(
    ("spec", "size", "num_frames", "latent_shape", "num_tokens"),
    [
        (T2V_A14B, (1280, 720), 81, (16, 21, 90, 160), 75_600),
        (I2V_A14B, (1280, 720), 81, (16, 21, 90, 160), 75_600),
        (T2V_A14B, (832, 480), 81, (16, 21, 60, 104), 32_760),
        (TI2V_5B, (1280, 704), 121, (48, 31, 44, 80), 27_280),
        (TI2V_5B, (1280, 704), 81, (48, 21, 44, 80), 18_480),
        (DEMO, (128, 128), 17, (48, 5, 8, 8), 80),
    ],
)
def test_latent_shapes_and_token_counts_are_the_official_ones(
    spec: ModelSpec,
    size: tuple[int, int],
    num_frames: int,
    latent_shape: tuple[int, int, int, int],
    num_tokens: int,
) -> None:
    """Golden values of fact sheet A 1.3; the last row is ours."""
    clip = geometry_of(spec, *size, num_frames)
    assert clip.latent_shape == latent_shape
    assert clip.num_tokens == num_tokens


AREA_720P, AREA_480P, AREA_TI2V = 1280 * 720, 832 * 480, 1280 * 704

# run: the official arithmetic (fact sheet A 5.3). Image, then I2V at 720p and 480p, then TI2V.
OFFICIAL_SIZES = [
    ((1280, 720), (1280, 720), (832, 464), (1248, 704)),
    ((1920, 1080), (1280, 720), (832, 464), (1248, 704)),
    ((720, 1280), (720, 1280), (464, 832), (704, 1248)),
    ((832, 480), (1248, 720), (832, 464), (1248, 704)),
    ((1024, 1024), (960, 960), (624, 624), (960, 928)),
    ((1000, 750), (1104, 816), (720, 544), (1088, 800)),
    ((3000, 1000), (1648, 544), (1088, 352), (1632, 544)),
]
# run: best_output_size (fact sheet A 5.4)
OFFICIAL_TI2V_SIZES = [
    ((1280, 704), (1280, 704)),
    ((832, 1104), (800, 1088)),
    ((1600, 900), (1248, 704)),
    ((500, 500), (960, 928)),
    ((4000, 500), (2656, 320)),
]


@pytest.mark.parametrize(("image", "at_720p", "at_480p", "ti2v"), OFFICIAL_SIZES)
def test_a_clip_takes_the_official_size_for_its_image(
    image: tuple[int, int],
    at_720p: tuple[int, int],
    at_480p: tuple[int, int],
    ti2v: tuple[int, int],
) -> None:
    assert size_for_image(I2V_A14B, *image, AREA_720P) == at_720p
    assert size_for_image(I2V_A14B, *image, AREA_480P) == at_480p
    assert size_for_image(TI2V_5B, *image, AREA_TI2V) == ti2v


@pytest.mark.parametrize(("image", "size"), OFFICIAL_TI2V_SIZES)
def test_ti2v_takes_the_official_size_for_its_image(
    image: tuple[int, int], size: tuple[int, int]
) -> None:
    assert size_for_image(TI2V_5B, *image, AREA_TI2V) == size


takes_image = st.sampled_from([DEMO, TI2V_5B, I2V_A14B])
image_sides = st.integers(1, 20_000)


@given(spec=takes_image, image_width=image_sides, image_height=image_sides)
@example(spec=I2V_A14B, image_width=1, image_height=20_000)
@example(spec=I2V_A14B, image_width=1, image_height=292)  # fits the area, but not the rotary table
@example(spec=TI2V_5B, image_width=20_000, image_height=1)
def test_the_size_for_any_image_is_legal_or_refused(
    spec: ModelSpec, image_width: int, image_height: int
) -> None:
    area_px = spec.sampling.width * spec.sampling.height
    try:
        width, height = size_for_image(spec, image_width, image_height, area_px)
    except BadSize:
        return
    geometry_of(spec, width, height, num_frames=1)


@given(spec=takes_image, ratio=st.floats(1 / 4, 4), image_height=st.integers(100, 5000))
def test_the_size_for_a_common_image_fills_the_area_with_its_shape(
    spec: ModelSpec, ratio: float, image_height: int
) -> None:
    """Within one grid unit a side: the rounding takes no more than that from either."""
    area_px = spec.sampling.width * spec.sampling.height
    image_width = round(image_height * ratio)
    width, height = size_for_image(spec, image_width, image_height, area_px)

    assert width * height <= area_px
    ideal_width = math.sqrt(area_px * image_width / image_height)
    assert abs(width - ideal_width) <= spec.grid_px
    assert abs(height - area_px / ideal_width) <= spec.grid_px


@pytest.mark.parametrize("image", [(10, 4000), (4000, 10)])
def test_an_image_too_narrow_for_the_model_is_refused_with_its_size(
    image: tuple[int, int],
) -> None:
    with pytest.raises(BadSize, match=f"{image[0]}x{image[1]} px is too narrow") as caught:
        size_for_image(DEMO, *image, area_px=128 * 128)
    assert "Crop" in caught.value.hint
