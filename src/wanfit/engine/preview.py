"""Small pictures of a clip that is being made, straight from the latents: one product per pixel.

A cell of the latents mostly says which colour is there, and a linear map reads it off: RGB = latents
weights + bias, at the latents' own size. The map is fitted here, by least squares, to pictures of
flat and blended colours and what this very autoencoder makes of them, which takes less than a second
once per process. So it suits any autoencoder, and no table of somebody else's has to be trusted. Left
out: detail within a cell, for which there are small decoders with weights of their own.

Dims: B pictures, C latent channels, T latent frames, H W latent sides, F pixel frames, N cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from wanfit.engine.models.vae import Vae

CELLS = 8  # ours: sides of a fitted picture in latents
GRIDS = (1, 2, 3, 5)  # ours: colours along a side, from one for all to less than two cells each
ROUNDS = 6  # ours: with each grid, flat and blended: 6,144 cells in all for 48 unknowns
# Ours, as a part of the latents' variance: what no picture of the fit has moved counts for nothing.
RIDGE = 1e-3


class Colours(NamedTuple):
    """From latents to RGB in [-1, 1]."""

    weights: Tensor  # [C, 3], fp32
    bias: Tensor  # [3], fp32


def fit_colours(vae: Vae) -> Colours:
    """The map that fits `vae` best, on its device. The same every time: the colours have a seed."""
    spec = vae.spec
    device = vae.to_moments.weight.device
    generator = torch.Generator().manual_seed(0)
    cells, colours = [], []
    for _ in range(ROUNDS):
        pictures = _pictures(generator, CELLS * spec.stride_px)  # [B, 3, H, W]
        # A still clip: the first latent frame is a picture's, the next one that of frames after it.
        clip = pictures[:, :, None].repeat(1, 1, 1 + spec.stride_frames, 1, 1)
        latents = vae.encode(clip)  # [B, C, T, H, W]
        cells.append(latents.movedim(1, -1).flatten(0, -2).double())
        small = F.avg_pool2d(pictures, spec.stride_px)[:, :, None]
        small = small.expand(-1, -1, latents.shape[2], -1, -1)
        colours.append(small.movedim(1, -1).flatten(0, -2).double().to(device))
    return _least_squares(torch.cat(cells), torch.cat(colours))


def preview(latents: Tensor, colours: Colours) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of one frame of clean latents [C, H, W]."""
    rgb = torch.einsum("chw,cd->hwd", latents.float(), colours.weights) + colours.bias
    levels = rgb.add_(1).mul_(127.5).clamp_(0, 255)
    pixels: npt.NDArray[np.uint8] = levels.to(torch.uint8).cpu().numpy()
    return pixels


def _pictures(generator: torch.Generator, side_px: int) -> Tensor:
    """Two of each grid: flat squares and soft transitions, fp32 [B, 3, H, W] in [-1, 1]."""
    pictures = []
    for grid in GRIDS:
        colours = torch.rand(2, 3, grid, grid, generator=generator) * 2 - 1
        size = (side_px, side_px)
        pictures.append(F.interpolate(colours[:1], size, mode="nearest"))
        pictures.append(F.interpolate(colours[1:], size, mode="bilinear", align_corners=False))
    return torch.cat(pictures)


def _least_squares(cells: Tensor, colours: Tensor) -> Colours:
    """cells [N, C], colours [N, 3], both fp64. The ridge holds the weights, not the bias."""
    cell_mean, colour_mean = cells.mean(0), colours.mean(0)
    x, y = cells - cell_mean, colours - colour_mean
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram + ridge, x.T @ y)
    bias = colour_mean - cell_mean @ weights
    return Colours(weights.float(), bias.float())
