"""Running a network on overlapping squares and blending what comes out, without seams.

Each output pixel is a weighted mean of the tiles that cover it; the weights fall linearly to the
edge of a tile over the overlap and sum to one, so the result has no jump anywhere. Tiles are
spread evenly, so that none is thin.

Dims: B batch, C channels, F frames, H W sides; cells are the coarser grid (latent rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def blend_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    in_stride: int,
    out_stride: int,
) -> Tensor:
    """`run` on tiles of x [B, C, F, H, W], blended; the result lies on the CPU in fp32.

    `tile` is a side in cells; a cell is `in_stride` pixels of x and `out_stride` of the result. A
    quarter of a tile overlaps the next one, as in diffusers.
    """
    rows, columns = x.shape[3] // in_stride, x.shape[4] // in_stride
    overlap = max(1, tile // 4)
    total: Tensor | None = None
    weight = torch.zeros(rows * out_stride, columns * out_stride)
    for top, bottom in spans(rows, tile, overlap):
        for left, right in spans(columns, tile, overlap):
            part = x[
                ..., top * in_stride : bottom * in_stride, left * in_stride : right * in_stride
            ]
            out = run(part).float().cpu()
            ramp = torch.outer(
                ramps(top, bottom, rows, overlap, out_stride),
                ramps(left, right, columns, overlap, out_stride),
            )
            if total is None:
                total = torch.zeros(*out.shape[:3], *weight.shape)
            where = (
                slice(top * out_stride, bottom * out_stride),
                slice(left * out_stride, right * out_stride),
            )
            total[(..., *where)] += out * ramp
            weight[where] += ramp
    assert total is not None
    return total / weight


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """The (start, stop) of the fewest tiles that cover `size` cells, evenly spread.

    Neighbours overlap by at least `overlap` cells.
    """
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramps(start: int, stop: int, size: int, overlap: int, stride: int) -> Tensor:
    """The weight of each output row of a tile: 1 inside, falling towards an inner border."""
    position = torch.arange((stop - start) * stride, dtype=torch.float32) + 0.5
    width = overlap * stride
    weight = torch.ones_like(position)
    if start > 0:
        weight = torch.minimum(weight, position / width)
    if stop < size:
        weight = torch.minimum(weight, position.flip(0) / width)
    return weight
