"""Latents to frames, chunk by chunk, so that the whole clip is never in memory as pixels.

Dims: T latent frames, f frames of one chunk, F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfit.engine.models.vae import Vae
from wanfit.events import FramesReady, StepDone


def decode(vae: Vae, latents: Tensor) -> Iterator[FramesReady | StepDone]:
    """The frames of clean latents [1, C, T, H, W]; one step per latent frame."""
    num_chunks = latents.shape[2]
    for step, chunk in enumerate(vae.decode(latents), start=1):
        yield FramesReady(to_uint8(chunk))
        yield StepDone("decode", step, num_chunks)


def to_uint8(frames: Tensor) -> npt.NDArray[np.uint8]:
    """[1, 3, f, H, W] in [-1, 1] to uint8 [f, H, W, 3].

    Truncates, as both references do (official: utils.py, save_video); rounding would be half a
    step nearer on average, and would differ from both in half of all values.
    """
    levels = (frames.squeeze(0).clamp(-1, 1) + 1) / 2 * 255
    pixels: npt.NDArray[np.uint8] = levels.permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()
    return pixels
