"""Small pictures of a clip that is being made, straight from the latents: one product per pixel.

A cell of the latents mostly says which colour is there, and a linear map reads it off, at the
latents' own size. It lies beside the autoencoder's weights (`preview.json`, as the demo has it), or
is fitted here by least squares to gliding colours and what this very autoencoder makes of them,
once per process. So it suits any autoencoder, and no table of somebody else's has to be trusted.
Left out: detail within a cell, for which there are small decoders with weights of their own.

Dims: B clips, C latent channels, T latent frames, H W latent sides, F pixel frames, N cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from wanfit.engine.models.vae import Vae
from wanfit.specs import VaeSpec

FILE_NAME = "preview.json"
CELLS = 6  # ours: sides of a fitted clip in latents
LATENT_FRAMES = 3  # ours: the first, one after it, one that has a longer past
GRIDS = (1, 2, 3, 6)  # ours: colours along a side, from one for all to more than one per cell
REPEATS = 3  # ours: clips of each grid, flat and of each grid, blended: 24 clips, 2,592 cells
# Ours, as a part of the latents' variance: what no clip of the fit has moved counts for little.
RIDGE = 1e-2


class Colours(NamedTuple):
    """From a latent frame and the mean of those up to it to RGB in [-1, 1]."""

    weights: Tensor  # [2 C, 3], fp32
    bias: Tensor  # [3], fp32


def read_colours(directory: Path, device: torch.device) -> Colours | None:
    """The map that lies in the directory of an autoencoder; None: there is none."""
    try:
        fields = json.loads((directory / FILE_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Colours(*(torch.tensor(fields[name], device=device) for name in Colours._fields))


def write_colours(directory: Path, colours: Colours) -> None:
    """Puts a map beside an autoencoder, with four digits: a 255th is 0.0039."""
    fields = {
        "weights": [[round(value, 4) for value in row] for row in colours.weights.tolist()],
        "bias": [round(value, 4) for value in colours.bias.tolist()],
    }
    (directory / FILE_NAME).write_text(json.dumps(fields) + "\n", encoding="utf-8")


def fit_colours(vae: Vae) -> Colours:
    """The map that fits `vae` best, on its device. The same every time: the colours have a seed."""
    generator = torch.Generator().manual_seed(0)
    num_frames = 1 + (LATENT_FRAMES - 1) * vae.spec.stride_frames
    side_px = CELLS * vae.spec.stride_px
    return fit_to(vae, (_clips(generator, num_frames, side_px) for _ in range(REPEATS)))


def fit_to(vae: Vae, batches: Iterable[Tensor]) -> Colours:
    """The same, fitted to clips [B, 3, F, H, W] in [-1, 1]."""
    cells, colours = [], []
    for clips in batches:
        latents = vae.encode(clips)
        shown = average_colours(clips.to(latents.device), vae.spec)
        for t in range(latents.shape[2]):
            cells.append(_features(latents, t).movedim(1, -1).flatten(0, -2).double())
            colours.append(shown[:, :, t].movedim(1, -1).flatten(0, -2).double())
    return _least_squares(torch.cat(cells), torch.cat(colours))


def average_colours(frames: Tensor, spec: VaeSpec) -> Tensor:
    """What a preview should show: frames [B, 3, F, H, W], averaged per cell, [B, 3, T, H, W]."""
    small = F.avg_pool3d(frames, (1, spec.stride_px, spec.stride_px))
    first, rest = small[:, :, :1], small[:, :, 1:]
    return torch.cat([first, F.avg_pool3d(rest, (spec.stride_frames, 1, 1))], dim=2)


def preview(latents: Tensor, colours: Colours) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]: the last one of clean latents [1, C, T, H, W]."""
    features = _features(latents, latents.shape[2] - 1).squeeze(0)
    rgb = torch.einsum("chw,cd->hwd", features, colours.weights) + colours.bias
    levels = rgb.add_(1).mul_(127.5).clamp_(0, 255)
    pixels: npt.NDArray[np.uint8] = levels.to(torch.uint8).cpu().numpy()
    return pixels


def _features(latents: Tensor, t: int) -> Tensor:
    """[B, 2 C, H, W]: the latent frame t, and the mean of all up to it, which it may lean on."""
    return torch.cat([latents[:, :, t], latents[:, :, : t + 1].mean(2)], dim=1).float()


def _clips(generator: torch.Generator, num_frames: int, side_px: int) -> Tensor:
    """Two of each grid, flat squares and soft transitions, that glide: fp32 [B, 3, F, H, W].

    Each is a window of a larger picture, which moves by a quarter of its side in all.
    """
    clips = []
    way_px = side_px // 4
    for grid in GRIDS:
        for mode in ("nearest", "bilinear"):
            colours = torch.rand(1, 3, grid, grid, generator=generator) * 2 - 1
            picture = F.interpolate(colours, (side_px + way_px, side_px + way_px), mode=mode)[0]
            ends = torch.randint(0, way_px + 1, (2, 2), generator=generator).tolist()
            (top, left), (last_top, last_left) = ends
            frames = []
            for i in range(num_frames):
                part = i / (num_frames - 1)
                y = round(top + part * (last_top - top))
                x = round(left + part * (last_left - left))
                frames.append(picture[:, y : y + side_px, x : x + side_px])
            clips.append(torch.stack(frames, dim=1))
    return torch.stack(clips)


def _least_squares(cells: Tensor, colours: Tensor) -> Colours:
    """cells [N, 2 C], colours [N, 3], both fp64. The ridge holds the weights, not the bias."""
    cell_mean, colour_mean = cells.mean(0), colours.mean(0)
    x, y = cells - cell_mean, colours - colour_mean
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram + ridge, x.T @ y)
    bias = colour_mean - cell_mean @ weights
    return Colours(weights.float(), bias.float())
