"""Running a network on overlapping squares and blending what comes out, without seams.

Each output pixel is a weighted mean of the tiles that cover it; the weights fall linearly to the
edge of a tile over the overlap and sum to one, so the result has no jump anywhere. Where the tiles
lie is said by `wanfit.plan.vae`, which counts their bytes.

A tile goes through the whole clip before the next begins, since the causal history of one tile is
as large as the tile's share of the frame. So pictures come in bands of rows, each of the whole
clip, as soon as no further tile reaches into them. Sums are kept on the host, for one band only.

Dims: B batch, C channels, F frames, H W sides; cells are the coarser grid (latent rows, columns).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wanfit.plan.vae import Span, tile_spans

Run = Callable[[Tensor], Iterator[Tensor]]


class Band(NamedTuple):
    """Rows that are done. The values are overwritten when the next step is asked for."""

    top: int  # the first of them, in output pixels
    values: Tensor  # [B, C, F, rows, W] fp32 on the CPU


class Strides(NamedTuple):
    """Pixels per cell."""

    into: int  # of what goes into the network
    out: int  # of what comes out


def blend_tiles(
    run: Run, x: Tensor, frames: int, tile: int, strides: Strides
) -> Iterator[Band | None]:
    """`run` on tiles of x [B, C, F, H, W], blended. Yields after each step, most without a band.

    `run` yields the `frames` output frames of a tile piece by piece, and each piece is a step.
    `tile` is a side in cells.
    """
    rows = tile_spans(x.shape[3] // strides.into, tile)
    columns = tile_spans(x.shape[4] // strides.into, tile)
    down, across = shares(rows, strides.out), shares(columns, strides.out)
    width = columns[-1].stop * strides.out
    sums: Tensor | None = None  # of the rows of the current band
    for i, row in enumerate(rows):
        top = row.start * strides.out
        for column, share in zip(columns, across, strict=True):
            place = slice(column.start * strides.out, column.stop * strides.out)
            part = x[..., _pixels(row, strides.into), _pixels(column, strides.into)]
            weight = torch.outer(down[i], share)
            done = 0
            for piece in run(part):
                if sums is None:
                    sums = torch.zeros(*piece.shape[:2], frames, piece.shape[3], width)
                where = sums[:, :, done : done + piece.shape[2], :, place]
                where.add_((piece.float() * weight.to(piece.device)).cpu())
                done += piece.shape[2]
                del piece  # nothing of it is needed while the next one is made
                yield None
        assert sums is not None
        following = rows[i + 1].start * strides.out if i + 1 < len(rows) else None
        final = sums.shape[3] if following is None else following - top
        yield Band(top, sums[:, :, :, :final])
        _move_up(sums, final)


def join_bands(steps: Iterable[Band | None]) -> Tensor:
    """All rows of a blend at once, [B, C, F, H, W]: for what is small."""
    return torch.cat([step.values.clone() for step in steps if step is not None], dim=3)


def shares(spans: Sequence[Span], stride: int) -> list[Tensor]:
    """The weight of each tile along one axis, fp32 [pixels of the tile].

    1 where a tile is alone, falling linearly over the overlap towards a neighbour; at each pixel
    the weights of all tiles sum to one.
    """
    total = torch.zeros(spans[-1].stop * stride)
    ramps = []
    for span in spans:
        position = torch.arange((span.stop - span.start) * stride, dtype=torch.float32) + 0.5
        ramp = torch.ones_like(position)
        if span.start > 0:
            ramp = torch.minimum(ramp, position / (span.overlap * stride))
        if span is not spans[-1]:
            ramp = torch.minimum(ramp, position.flip(0) / (span.overlap * stride))
        total[_pixels(span, stride)] += ramp
        ramps.append(ramp)
    return [ramp / total[_pixels(span, stride)] for span, ramp in zip(spans, ramps, strict=True)]


def _pixels(span: Span, stride: int) -> slice:
    return slice(span.start * stride, span.stop * stride)


def _move_up(sums: Tensor, rows: int) -> None:
    """Drops the first rows; zeros come in below. Frame by frame, to hold little twice."""
    kept = sums.shape[3] - rows
    for batch, frame in itertools.product(range(sums.shape[0]), range(sums.shape[2])):
        picture = sums[batch, :, frame]
        picture[:, :kept] = picture[:, rows:].clone()
        picture[:, kept:] = 0
