"""Latents to frames, chunk by chunk, so that the whole clip is never in memory as pixels.

With tiles the whole clip has to wait on the host, as bytes, until the last tile is done.

Dims: C latent channels, T latent frames, f frames of one chunk, F pixel frames, H W sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfit.engine.models.vae import Vae
from wanfit.events import FramesReady, StepDone
from wanfit.plan.vae import num_tiles
from wanfit.specs import VaeSpec


def decode_steps(spec: VaeSpec, latent_shape: Sequence[int], tile_px: int | None) -> int:
    """How many StepDone `decode` yields for latents [1, C, T, H, W] of that shape."""
    *_, frames, height, width = latent_shape
    stride = spec.stride_px
    return frames * num_tiles(spec, width * stride, height * stride, tile_px)


def decode(
    vae: Vae, latents: Tensor, tile_px: int | None = None
) -> Iterator[FramesReady | StepDone]:
    """The frames of clean latents [1, C, T, H, W].

    One step per latent frame, and with `tile_px` per tile; then all frames come at the end.
    """
    steps = decode_steps(vae.spec, latents.shape, tile_px)
    if tile_px is not None:
        yield from _decode_tiles(vae, latents, tile_px, steps)
        return
    chunks = map(to_uint8, vae.decode(latents))
    for step, chunk in enumerate(chunks, start=1):
        yield FramesReady(chunk)
        yield StepDone("decode", step, steps)


def _decode_tiles(
    vae: Vae, latents: Tensor, tile_px: int, steps: int
) -> Iterator[FramesReady | StepDone]:
    stride_px, stride_frames = vae.spec.stride_px, vae.spec.stride_frames
    *_, latent_frames, height, width = latents.shape
    num_frames = (latent_frames - 1) * stride_frames + 1
    clip = np.empty((num_frames, height * stride_px, width * stride_px, 3), np.uint8)
    step = 0
    for band in vae.decode_tiles(latents, tile_px):
        if band is None:
            step += 1
            yield StepDone("decode", step, steps)
            continue
        rows = slice(band.top, band.top + band.values.shape[3])
        for i, frame in enumerate(band.values.split(1, dim=2)):
            clip[i : i + 1, rows] = to_uint8(frame)
    yield FramesReady(clip[:1])
    for start in range(1, num_frames, stride_frames):
        yield FramesReady(clip[start : start + stride_frames])


def to_uint8(frames: Tensor) -> npt.NDArray[np.uint8]:
    """[1, 3, f, H, W] in [-1, 1] to uint8 [f, H, W, 3].

    Truncates, as both references do (official: utils.py, save_video); rounding would be half a
    step nearer on average, and would differ from both in half of all values.
    """
    levels = frames.squeeze(0).clamp(-1, 1).add_(1).div_(2).mul_(255)
    pixels: npt.NDArray[np.uint8] = levels.permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()
    return pixels
