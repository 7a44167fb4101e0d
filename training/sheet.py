"""Contact sheets: some frames of each clip in a row, the caption under them.

For people who want to see what the grammar draws, or what a model made of it:
`python -m training.sheet out.png --seed 0 --clips 24`. Left out: anything that judges a clip, which
is the analyser's work.

Dims: F frames, H W pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from training.shapes import (
    MOTIONS,
    SHAPES,
    caption,
    column,
    render,
    sample_attributes,
    sample_wording,
)

Frames = npt.NDArray[np.uint8]  # [F, H, W, 3]

GAP_PX = 4
LINE_PX = 14
CHARS_PER_PX = 1 / 6  # of Pillow's own font


@dataclass(frozen=True, slots=True)
class Strip:
    """One clip of a sheet and the lines under it."""

    frames: Frames
    lines: tuple[str, ...]


def draw_sheet(strips: Sequence[Strip], path: Path, columns: int = 2, shown: int = 5) -> None:
    """Writes a PNG with `shown` frames of each clip, evenly spread, the first and last among them.

    All clips have the same size.
    """
    assert strips, "a sheet of nothing"
    cells = [_draw_strip(strip, shown) for strip in strips]
    width = max(cell.width for cell in cells) + 2 * GAP_PX
    height = max(cell.height for cell in cells) + GAP_PX
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * width + GAP_PX, i // columns * height + GAP_PX))
    sheet.save(path)


def _draw_strip(strip: Strip, shown: int) -> Image.Image:
    count, height, width, _ = strip.frames.shape
    picked = np.linspace(0, count - 1, min(shown, count)).round().astype(int)
    cell_width = len(picked) * (width + GAP_PX)
    most_chars = int(cell_width * CHARS_PER_PX)
    lines = [
        line[i : i + most_chars] for line in strip.lines for i in range(0, len(line), most_chars)
    ]
    cell = Image.new("RGB", (cell_width, height + LINE_PX * len(lines) + GAP_PX), "white")
    for i, frame in enumerate(picked):
        cell.paste(Image.fromarray(strip.frames[frame]), (i * (width + GAP_PX), 0))
    draw = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        draw.text((0, height + 2 + LINE_PX * i), line, fill="black")
    return cell


def to_uint8(frames: torch.Tensor) -> Frames:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    scaled = ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws ground-truth clips with their captions.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT in px")
    parser.add_argument("--two", type=float, default=0.35, help="share of clips with two objects")
    parser.add_argument("--only", choices=MOTIONS + SHAPES, help="only this motion or shape")
    given = parser.parse_args()

    width, height = (int(side) for side in given.size.split("x"))
    generator = torch.Generator().manual_seed(given.seed)
    rows = sample_attributes(given.clips * 40, generator, two_objects=given.two)
    if given.only in MOTIONS:
        rows = rows[column(rows, "motion_1") == MOTIONS.index(given.only)]
    elif given.only in SHAPES:
        rows = rows[column(rows, "shape_1") == SHAPES.index(given.only)]
    rows = rows[: given.clips]
    wording = sample_wording(rows, generator)
    clips = render(rows, given.frames, height, width)
    strips = [
        Strip(to_uint8(clip), (caption(row, words),))
        for clip, row, words in zip(clips, rows, wording, strict=True)
    ]
    draw_sheet(strips, given.output)
    print(f"{given.output}: {len(strips)} clips")


if __name__ == "__main__":
    main()
