"""What a clip shows, read from its pixels: colours, shapes, sizes and motions.

`analyse` knows the world of `training.shapes` (its palette, its shapes, its motions) and nothing
about what the clip should show; only `score` sees what was asked for. Pixels are told apart by
colour, so blurred edges and small errors of a VAE do little harm. Left out: objects of the same
colour as another, more than two objects, and the spin of a disc or a ring, which nobody can see.

Dims: F frames, H W pixels, G side of the grid on which shapes are compared.
Lengths are in half the shorter side of the frame, as in `training.shapes`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.shapes import (
    COLORS,
    MOTIONS,
    RADII,
    ROUND_SHAPES,
    SHAPES,
    SIZES,
    column,
    palette,
    signed_distance,
)

# Each threshold lies well between what the renderer draws on either side of it.
FOREGROUND = 0.38  # distance of colours in [-1, 1]; half of the least in the palette
LEAST_CORE = 0.0012  # pixels 1 or 2 px inside an edge, per squared pixel of the short side
GROWS = 0.9  # change of the logarithm of the area; drawn: 1.8
MOVES = 0.22  # displacement of the centre; drawn: 0.44 to 0.84 of half a side
BOUNCES = 0.3  # range of the centre's height, where it ends near where it began; drawn: 0.7 to 1
TURNS = 0.16  # what a shape turned half-way does not share with itself upright; drawn: 0.25 or more
GRID = 40  # G
GRID_REACH = 1.5  # half the grid's side, in units of the square root of the shape's area
ROTATIONS = 24


@dataclass(frozen=True, slots=True)
class ObjectSeen:
    """One object. Indices into COLORS, SHAPES, SIZES, MOTIONS."""

    color: int
    shape: int
    size: int
    motion: int


@dataclass(frozen=True, slots=True)
class ClipSeen:
    """What a clip shows: none, one or two objects, the larger colour first."""

    background: int
    objects: tuple[ObjectSeen, ...]

    def describe(self) -> str:
        """One line for a person."""
        shown = [
            f"{SIZES[o.size]} {COLORS[o.color]} {SHAPES[o.shape]} {MOTIONS[o.motion]}"
            for o in self.objects
        ]
        return f"{' and '.join(shown) or 'nothing'} on {COLORS[self.background]}"


def analyse(frames: Tensor | npt.NDArray[np.uint8]) -> ClipSeen:
    """What a clip shows.

    `frames`: uint8 [F, H, W, 3], or floating point [3, F, H, W] in [-1, 1]; at least 5 frames.
    """
    clip = _as_clip(frames)
    background = _border_color(clip)
    ground = int(_nearest(background[None])[0])
    inks = _object_colors(clip, background, ground)
    covers = _covers(clip, background, inks)
    seen = tuple(
        _read_object(covers, which, int(_nearest(ink[None])[0])) for which, ink in enumerate(inks)
    )
    return ClipSeen(ground, seen)


# ---------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------


def _as_clip(frames: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    """fp32 [F, 3, H, W] in [-1, 1], on the CPU."""
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(frames)
    if frames.dtype == torch.uint8:
        return frames.cpu().permute(0, 3, 1, 2).float() / 127.5 - 1
    return frames.detach().cpu().float().transpose(0, 1).clamp(-1, 1)


def _border_color(clip: Tensor) -> Tensor:
    """The median of the outermost pixels of all frames, [3]: objects cover less than half of it."""
    sides = [clip[:, :, 0], clip[:, :, -1], clip[:, :, :, 0], clip[:, :, :, -1]]
    border = torch.cat(sides, 2)  # [F, 3, pixels]
    return border.transpose(0, 1).flatten(1).median(1).values


def _nearest(colors: Tensor) -> Tensor:
    """The nearest entries of the palette: [n, 3] -> int64 [n]."""
    return _nearest_of(colors, palette())


def _nearest_of(colors: Tensor, choices: Tensor) -> Tensor:
    """The index of the nearest of `choices` [c, 3] for each of `colors` [n, 3]: int64 [n]."""
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, and |a|^2 is the same for every choice.
    closeness = choices @ colors.T - choices.square().sum(1, keepdim=True) / 2  # [c, n]
    best, index = closeness[0].clone(), torch.zeros(len(colors), dtype=torch.int64)
    for choice in range(1, len(choices)):
        nearer = closeness[choice] > best
        index = torch.where(nearer, choice, index)
        best = torch.maximum(best, closeness[choice])
    return index


def _object_colors(clip: Tensor, background: Tensor, ground: int) -> list[Tensor]:
    """The measured colours [3] of up to two objects, the one with more pixels first."""
    frames, _, height, width = clip.shape
    pixels = clip.permute(0, 2, 3, 1).reshape(-1, 3)
    labels = _nearest(pixels)
    red, green, blue = (pixels - background).square().T
    labels[red + green + blue < FOREGROUND**2] = ground
    maps = labels.view(frames, height, width)
    least = LEAST_CORE * frames * min(height, width) ** 2
    found = []
    for color in range(len(COLORS)):
        if color == ground or int((maps == color).sum()) < least:
            continue
        # An edge between two colours passes through others, but only some pixels wide.
        core = _shrink(maps == color, 1 + (min(height, width) >= 128))
        count = int(core.sum())
        if count >= least:
            found.append((count, pixels[core.flatten()].median(0).values))
    found.sort(key=lambda item: -item[0])
    return [ink for _, ink in found[:2]]


def _grow(mask: Tensor, by: int) -> Tensor:
    """Dilates bool [F, H, W] by a square that reaches `by` pixels each way."""
    _, height, width = mask.shape
    padded = functional.pad(mask, (by, by, by, by))
    lines = torch.zeros_like(padded[:, :, :width])
    for shift in range(2 * by + 1):
        lines |= padded[:, :, shift : shift + width]
    grown = torch.zeros_like(mask)
    for shift in range(2 * by + 1):
        grown |= lines[:, shift : shift + height]
    return grown


def _shrink(mask: Tensor, by: int) -> Tensor:
    """Erodes bool [F, H, W] likewise. What lies outside the frame takes nothing away."""
    return ~_grow(~mask, by)


def _covers(clip: Tensor, background: Tensor, inks: list[Tensor]) -> Tensor:
    """How much of each pixel each object covers: fp32 [objects, F, H, W] in [0, 1]."""
    frames, _, height, width = clip.shape
    pixels = clip.permute(0, 2, 3, 1).reshape(-1, 3)
    labels = _nearest_of(pixels, torch.stack([background, *inks])).view(frames, height, width)
    covers = []
    for which, ink in enumerate(inks):
        mask = labels == which + 1
        mask = mask & _grow(_shrink(mask, 1), 2)  # drops edges of the other object
        step = ink - background
        share = ((pixels - background) @ (step / step.dot(step))).view(frames, height, width)
        other = (labels != which + 1) & (labels != 0)
        covers.append(share.clamp(0, 1) * (_grow(mask, 1) & ~other))
    return torch.stack(covers) if covers else torch.zeros(0, frames, height, width)


# ---------------------------------------------------------------------------------------------
# One object
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Track:
    """Where an object is in each frame: fp32 [F] each, and whether it is whole there."""

    area: Tensor  # px
    x: Tensor  # px from the left
    y: Tensor  # px from the top
    whole: Tensor  # bool: neither at the frame's edge nor beside the other object


def _read_object(covers: Tensor, which: int, color: int) -> ObjectSeen:
    cover = covers[which]
    others = _grow((covers.sum(0) - cover) > 0.5, 1)
    track = _follow(cover, others)
    motion = _motion(cover, others, track)
    shape = _shape(cover, track, upright=MOTIONS[motion] != "spinning")
    size = _size(track, shape, min(cover.shape[1:]))
    return ObjectSeen(color=color, shape=shape, size=size, motion=motion)


def _follow(cover: Tensor, others: Tensor) -> _Track:
    _, height, width = cover.shape
    area = cover.sum((1, 2)).clamp(min=1e-3)
    x = (cover.sum(1) * (torch.arange(width) + 0.5)).sum(1) / area
    y = (cover.sum(2) * (torch.arange(height) + 0.5)).sum(1) / area
    solid = cover > 0.5
    edge = torch.zeros(height, width, dtype=torch.bool)
    edge[[0, -1]] = True
    edge[:, [0, -1]] = True
    blocked = (solid & (others | edge)).flatten(1).any(1)
    return _Track(area, x, y, ~blocked & (area > 0.2 * area.median()))


def _motion(cover: Tensor, others: Tensor, track: _Track) -> int:
    """The index into MOTIONS, from the path of the centre and the change of the area."""
    _, height, width = cover.shape
    x, y = track.x * (2 / width), track.y * (2 / height)
    growth = float((track.area[-1] / track.area[0]).log())
    right, down = float(x[-1] - x[0]), float(y[-1] - y[0])
    if abs(growth) > GROWS:
        return MOTIONS.index("growing" if growth > 0 else "shrinking")
    rise = float(y.max() - y.min())
    if rise > BOUNCES and abs(down) < 0.4 * rise:
        return MOTIONS.index("bouncing")
    if math.hypot(right, down) > MOVES:
        return _direction(right, down)
    return MOTIONS.index("spinning" if _turn(cover, others, track) > TURNS else "still")


def _direction(right: float, down: float) -> int:
    """The nearest of the eight directions."""
    names = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
    return MOTIONS.index(names[round(math.atan2(down, right) / (math.pi / 4)) % 8])


def _turn(cover: Tensor, others: Tensor, track: _Track) -> float:
    """How unlike itself a resting object becomes: 0 (never changes) to 1.

    1 - intersection / union with the first frame, centres aligned, where nothing else is in the
    way; the upper quartile over the frames.
    """
    unlike = []
    for f in range(1, len(cover)):
        shift = (round(float(track.y[0] - track.y[f])), round(float(track.x[0] - track.x[f])))
        moved = cover[f].roll(shift, (0, 1))
        free = ~(others[0] | others[f].roll(shift, (0, 1)))
        both = (torch.minimum(moved, cover[0]) * free).sum()
        either = (torch.maximum(moved, cover[0]) * free).sum().clamp(min=1e-3)
        unlike.append(1 - both / either)
    return float(torch.stack(unlike).quantile(0.75))


def _shape(cover: Tensor, track: _Track, upright: bool) -> int:
    """The index into SHAPES of the template that is nearest on the average frame."""
    frames = track.whole.nonzero()[:, 0] if bool(track.whole.any()) else torch.arange(len(cover))
    steps = _grid_steps() * track.area[frames, None].sqrt()  # [f, G], px
    height, width = cover.shape[1:]
    columns = (track.x[frames, None] + steps) * (2 / width) - 1
    lines = (track.y[frames, None] + steps) * (2 / height) - 1
    where = torch.stack(
        [columns[:, None, :].expand(-1, GRID, GRID), lines[:, :, None].expand(-1, GRID, GRID)], -1
    )
    normal = functional.grid_sample(cover[frames, None], where, align_corners=False)[:, 0]
    templates = _templates()[:, :1] if upright else _templates()
    unlike = torch.cdist(normal.flatten(1), templates.flatten(2).flatten(0, 1)).square()
    unlike = unlike.view(len(frames), len(SHAPES), -1)
    return int(unlike.amin(2).mean(0).argmin())


def _grid_steps() -> Tensor:
    """The grid's coordinates, [G], in units of the square root of the shape's area."""
    return (torch.arange(GRID) + 0.5) * (2 * GRID_REACH / GRID) - GRID_REACH


@functools.cache
def _templates() -> Tensor:
    """Every shape turned by each rotation, of area 1 and centred: [shapes, rotations, G, G]."""
    steps = _grid_steps()
    x, y = steps[None, :].expand(GRID, GRID), steps[:, None].expand(GRID, GRID)
    templates = []
    for shape, name in enumerate(SHAPES):
        area, middle_x, middle_y = _moments(shape)
        scale = math.sqrt(area)
        pixel = scale * 2 * GRID_REACH / GRID
        for rotation in range(ROTATIONS):
            angle = rotation * 2 * math.pi / ROTATIONS
            u = (math.cos(angle) * x + math.sin(angle) * y) * scale + middle_x
            v = (math.cos(angle) * y - math.sin(angle) * x) * scale + middle_y
            templates.append((0.5 - signed_distance(name, u, v) / pixel).clamp(0, 1))
    return torch.stack(templates).view(len(SHAPES), ROTATIONS, GRID, GRID)


@functools.cache
def _moments(shape: int) -> tuple[float, float, float]:
    """Area and centre (x, y) of a shape of radius 1, by counting points."""
    axis = torch.linspace(-1.4, 1.4, 701)
    x, y = axis[None, :].expand(701, 701), axis[:, None].expand(701, 701)
    inside = (signed_distance(SHAPES[shape], x, y) < 0).float()
    count = inside.sum()
    cell = float(axis[1] - axis[0]) ** 2
    return float(count) * cell, float((inside * x).sum() / count), float((inside * y).sum() / count)


def _size(track: _Track, shape: int, short_px: int) -> int:
    """The index into SIZES of the radius half-way through the clip."""
    middle = len(track.area) // 2
    if bool(track.whole[middle]) or not bool(track.whole.any()):
        area = track.area[middle]
    else:
        area = track.area[track.whole].median()
    radius = math.sqrt(float(area) / _moments(shape)[0]) / (short_px / 2)
    bounds = [math.sqrt(a * b) for a, b in itertools.pairwise(RADII)]
    return sum(radius > bound for bound in bounds)


# ---------------------------------------------------------------------------------------------
# What was asked for
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """Whether each attribute of one object is right; None: not asked for, or cannot be seen."""

    color: bool
    shape: bool
    size: bool | None
    motion: bool | None

    @property
    def right(self) -> bool:
        """Colour, shape and motion (the size is a figure of its own)."""
        return self.color and self.shape and self.motion is not False


@dataclass(frozen=True, slots=True)
class ClipScore:
    """Whether a clip shows what was asked for."""

    background: bool
    count: bool  # as many objects as asked for
    objects: tuple[ObjectScore, ...]  # in the order in which they were asked for
    exchanged: bool  # two of the colours asked for have changed places


def expected(attributes: Tensor) -> ClipSeen:
    """What a clip of `attributes` [19] shows, as `analyse` would say it, objects as named."""
    row = attributes[None].cpu()
    objects = []
    for k in range(1, int(column(row, "count")) + 1):
        color, shape, size, motion = (
            int(column(row, f"{name}_{k}")) for name in ("color", "shape", "size", "motion")
        )
        objects.append(ObjectSeen(color=color, shape=shape, size=size, motion=motion))
    return ClipSeen(int(column(row, "background")), tuple(objects))


def score(
    seen: ClipSeen, asked: ClipSeen, sizes_named: tuple[bool, ...] = (True, True)
) -> ClipScore:
    """Compares what a clip shows with what was asked for.

    Objects are matched by colour, what is left over by order. `sizes_named` says for each object
    whether the caption named its size; where not, any size will do and is not counted.
    """
    matched = _match(seen, asked)
    objects = tuple(
        _score_object(found, want, named)
        for found, want, named in zip(matched, asked.objects, sizes_named, strict=False)
    )
    return ClipScore(
        background=seen.background == asked.background,
        count=len(seen.objects) == len(asked.objects),
        objects=objects,
        exchanged=_exchanged(seen, asked, matched),
    )


def _match(seen: ClipSeen, asked: ClipSeen) -> list[ObjectSeen | None]:
    """For each object asked for the one that stands for it, None where there are too few."""
    left = list(seen.objects)
    matched: list[ObjectSeen | None] = []
    for want in asked.objects:
        found = next((o for o in left if o.color == want.color), None)
        matched.append(found)
        if found is not None:
            left.remove(found)
    return [found or (left.pop(0) if left else None) for found in matched]


def _score_object(found: ObjectSeen | None, want: ObjectSeen, named: bool) -> ObjectScore:
    unseen = SHAPES[want.shape] in ROUND_SHAPES and MOTIONS[want.motion] == "spinning"
    return ObjectScore(
        color=found is not None and found.color == want.color,
        shape=found is not None and found.shape == want.shape,
        size=(found is not None and found.size == want.size) if named else None,
        motion=None if unseen else found is not None and found.motion == want.motion,
    )


def _exchanged(seen: ClipSeen, asked: ClipSeen, matched: list[ObjectSeen | None]) -> bool:
    """An object has the background's colour and the reverse, or two objects each other's."""
    ground = any(want.color == seen.background for want in asked.objects) and any(
        found.color == asked.background for found in seen.objects
    )
    if len(asked.objects) < 2 or None in matched:
        return ground
    wanted = [(o.shape, o.motion) for o in asked.objects]
    found = [(o.shape, o.motion) for o in matched if o is not None]
    same_colors = {o.color for o in asked.objects} == {o.color for o in seen.objects}
    return ground or (same_colors and wanted[0] != wanted[1] and found == wanted[::-1])
