"""Pixels moved into channels and back: what the VAE does between its layers without a parameter.

2.2 folds 2x2 pixels into channels at both ends, and goes around each stage by a shortcut that
averages blocks of pixels, or repeats values over them.

Dims: B batch, C channels, F frames, H W sides. A clip is [B, C, F, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanfit.engine.models.causal import zeros_before


class AverageDown(nn.Module):
    """2.2's shortcut around a DownStage: means of blocks of pixels and groups of channels.

    A block of `frames` x `side` x `side` values is laid out as channels, time slowest, and each of
    the `out` channels is the mean of its share. A clip's odd first frame gets a zero partner in
    front. official: vae2_2.py, AvgDown3D.
    """

    def __init__(self, out: int, frames: int, side: int) -> None:
        super().__init__()
        self.out, self.frames, self.side = out, frames, side

    def forward(self, x: Tensor) -> Tensor:
        """x: a clip."""
        x = self._blocks(x).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        means: Tensor = x.unflatten(1, (self.out, -1)).mean(dim=2)
        return means

    def merge(self, frames: list[Tensor]) -> Tensor:
        """The frame [B, out, H, W], channels last, for the next frames [B, C, H, W]."""
        x = torch.stack(frames, dim=2) if len(frames) > 1 else frames[0].unsqueeze(2)
        x = self._blocks(x).squeeze(2)
        x = x.permute(0, 3, 5, 1, 2, 4, 6).flatten(3)
        means: Tensor = x.unflatten(3, (self.out, -1)).mean(dim=4)
        return means.permute(0, 3, 1, 2)

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, C, F / f, f, H / s, s, W / s, s] of a clip."""
        x = zeros_before(x, -x.shape[2] % self.frames)
        for axis, factor in ((2, self.frames), (4, self.side), (6, self.side)):
            x = x.unflatten(axis, (-1, factor))
        return x


class DuplicateUp(nn.Module):
    """2.2's shortcut around an UpStage: each value repeated over a block of pixels, added.

    The inverse layout of AverageDown; a clip's first frame is not doubled in time. official:
    vae2_2.py, DupUp3D. A repeated value is one value, broadcast.
    """

    def __init__(self, out: int, frames: int) -> None:
        super().__init__()
        self.out, self.frames_per_frame = out, frames

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [B, out, F, 2 H, 2 W], what came out of the stage, plus a clip x that went in."""
        blocks = self._blocks(x)
        factors = (self.frames_per_frame, -1, 2, -1, 2)
        skip = blocks.expand(*blocks.shape[:3], *factors).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        out: Tensor = y + skip[:, :, self.frames_per_frame - 1 :]
        return out

    def frames(self, x: Tensor, first: bool) -> list[Tensor]:
        """For each frame that comes of frame x, what to add, [B, out, H, 2 or 1, W, 2 or 1]."""
        blocks = self._blocks(x.unsqueeze(2)).squeeze(2)
        frames = blocks.expand(-1, -1, self.frames_per_frame, -1, -1, -1, -1).unbind(2)
        return list(frames[-1:] if first else frames)

    def _blocks(self, x: Tensor) -> Tensor:
        """A view [B, out, F, f, H, 2, W, 2] of x, with a 1 where the values are all the same.

        In the full layout channels are `out` x frames x rows x columns; x has fewer, and each of
        its channels fills the fastest of these axes.
        """
        different, rest = divmod(x.shape[1], self.out)
        assert rest == 0, (x.shape, self.out)
        shape = []
        for factor in (self.frames_per_frame, 2, 2):
            shape.append(min(factor, different))
            different //= shape[-1]
        blocks: Tensor = x.unflatten(1, (self.out, *shape)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return blocks


def fold_pixels(x: Tensor, patch: int) -> Tensor:
    """[B, 3, F, H, W] to [B, 3 p p, F, H / p, W / p]; channel (c p + column) p + row, official."""
    if patch == 1:
        return x
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    if patch == 1:
        return x
    x = x.unflatten(1, (3, patch, patch))  # [B, 3, column, row, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
