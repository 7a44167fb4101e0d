"""Pixels to latents to tokens: the only home of the 4n+1, /8, /16 and /2 arithmetic.

Dims: F pixel frames, T latent frames, H W latent sides, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanfit.errors import BadFrameCount, BadSize
from wanfit.specs import ROPE_POSITIONS, ModelSpec


@dataclass(frozen=True, slots=True)
class Geometry:
    """One clip's shape on its way through a model. Made by `geometry_of`, so always legal."""

    width: int  # px
    height: int  # px
    num_frames: int  # F
    latent_channels: int
    latent_frames: int  # T
    latent_height: int  # H
    latent_width: int  # W
    num_tokens: int  # L

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the noise and of what the VAE decodes."""
        return self.latent_channels, self.latent_frames, self.latent_height, self.latent_width


def geometry_of(spec: ModelSpec, width: int, height: int, num_frames: int) -> Geometry:
    """The geometry of a clip of `num_frames` frames of `width` x `height` pixels.

    Raises BadFrameCount or BadSize, naming the nearest legal values.
    """
    stride = spec.vae.stride_frames
    below, above = nearest_frame_counts(num_frames, stride)
    if num_frames not in (below, above):
        raise BadFrameCount(
            f"{num_frames} frames is not of the form {stride}n + 1,"
            f" from 1 to {_most_frames(stride)}",
            hint=_name_nearest(below, above),
        )
    for name, pixels in (("width", width), ("height", height)):
        _check_side(spec, name, pixels)

    latent_frames = (num_frames - 1) // stride + 1
    latent_height, latent_width = height // spec.vae.stride_px, width // spec.vae.stride_px
    _, patch_rows, patch_columns = spec.dit.patch
    return Geometry(
        width=width,
        height=height,
        num_frames=num_frames,
        latent_channels=spec.vae.latent_channels,
        latent_frames=latent_frames,
        latent_height=latent_height,
        latent_width=latent_width,
        num_tokens=latent_frames * (latent_height // patch_rows) * (latent_width // patch_columns),
    )


def nearest_frame_counts(num_frames: int, stride: int = 4) -> tuple[int, int]:
    """The legal counts next below and next above; both the same where there is only one."""
    return _nearest(num_frames, first=1, step=stride, last=_most_frames(stride))


def _most_frames(stride: int) -> int:
    return (ROPE_POSITIONS - 1) * stride + 1


def _check_side(spec: ModelSpec, name: str, pixels: int) -> None:
    grid = spec.grid_px
    most = ROPE_POSITIONS * grid
    below, above = _nearest(pixels, first=grid, step=grid, last=most)
    if pixels not in (below, above):
        raise BadSize(
            f"A {name} of {pixels} px is not a multiple of {grid} from {grid} to {most},"
            f" the grid of {spec.name}",
            hint=_name_nearest(below, above),
        )


def _nearest(value: int, *, first: int, step: int, last: int) -> tuple[int, int]:
    """The numbers of first, first + step, ... last next below and next above `value`."""
    inside = min(max(value, first), last)
    below = inside - (inside - first) % step
    return below, below if below == inside else below + step


def _name_nearest(below: int, above: int) -> str:
    return f"Use {below}" if below == above else f"The nearest are {below} and {above}"


def size_for_image(
    spec: ModelSpec, image_width: int, image_height: int, area_px: int
) -> tuple[int, int]:
    """(width, height) of a clip that keeps an image's aspect ratio within about `area_px` pixels.

    I2V-A14B and TI2V-5B round differently, and so do we. The size is legal for `spec`.
    Raises BadSize when the image is so narrow that no legal size has its shape.
    """
    if spec.task == "i2v":
        width, height = _size_i2v(
            image_width, image_height, area_px, spec.vae.stride_px, spec.grid_px
        )
    else:
        width, height = _size_ti2v(image_width, image_height, area_px, spec.grid_px)
    most = ROPE_POSITIONS * spec.grid_px
    if min(width, height) < spec.grid_px or max(width, height) > most:
        raise BadSize(
            f"An image of {image_width}x{image_height} px is too narrow for an area of"
            f" {area_px} px on a grid of {spec.grid_px} px",
            hint="Crop the image, or give width and height",
        )
    return width, height


def _size_i2v(
    image_width: int, image_height: int, area_px: int, stride_px: int, grid_px: int
) -> tuple[int, int]:
    """official: image2video.py. Its floats round down as they do there: 832x480 gives 832x464."""
    ratio = image_height / image_width
    patch = grid_px // stride_px
    latent_height = round(math.sqrt(area_px * ratio) // stride_px // patch * patch)
    latent_width = round(math.sqrt(area_px / ratio) // stride_px // patch * patch)
    return latent_width * stride_px, latent_height * stride_px


def _size_ti2v(image_width: int, image_height: int, area_px: int, grid_px: int) -> tuple[int, int]:
    """official: utils.py, best_output_size. Rounds a side down, fits the other; the better wins."""
    ratio = image_width / image_height
    ideal_width = math.sqrt(area_px * ratio)
    ideal_height = area_px / ideal_width

    width_first = int(ideal_width // grid_px * grid_px)
    height_first = int(ideal_height // grid_px * grid_px)
    candidates = [
        (width_first, int(area_px / width_first // grid_px * grid_px) if width_first else 0),
        (int(area_px / height_first // grid_px * grid_px) if height_first else 0, height_first),
    ]

    def distortion(size: tuple[int, int]) -> float:
        width, height = size
        if not width or not height:
            return math.inf
        return max(ratio / (width / height), (width / height) / ratio)

    by_width, by_height = candidates
    return by_width if distortion(by_width) < distortion(by_height) else by_height
