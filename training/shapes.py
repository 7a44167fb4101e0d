"""The world of the `demo` model: clips of coloured shapes that move, and captions for them.

One row of integers (`COLUMNS`) says everything about a clip; `render` draws it, with no chance in
it, so a seed gives the same clip again and thirty thousand rows cost a megabyte. A second row
(`WORDING_COLUMNS`) says how the clip is told: which phrasing, which verb, whether the size is
named. Pixels and token ids are computed for a whole batch at once, on whatever device the rows
are on. About one in seven combinations of colour, shape and motion, and two phrasings, are never
used in training. Left out: textures, light, perspective, and every word that is not in `WORDS`.

A change of the grammar changes the ids of the words, and a change of the drawing changes what the
model has learned: either asks for training again.

Dims: B clips, N objects, K columns, F frames, H W pixels, S tokens, P slots of a phrasing.
Lengths are in half the shorter side of the frame, so that a circle is round in every frame; x goes
to the right and y goes down from the centre. Time goes from -1 to 1 over a clip of any length.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "held_out"]

# No diamond (a square that spins is one half of the time), no hexagon (a small one is a circle).
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
# Far enough apart (at least 99 of 255) to be told by the nearest entry after a lossy VAE.
PALETTE = {
    "red": (215, 25, 30),
    "green": (30, 165, 50),
    "blue": (40, 70, 220),
    "yellow": (250, 232, 40),
    "orange": (245, 128, 15),
    "purple": (140, 40, 190),
    "pink": (250, 150, 190),
    "cyan": (40, 210, 220),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "brown": (120, 70, 30),
}
COLORS = tuple(PALETTE)
SIZES = ("small", "medium", "large")
RADII = (0.24, 0.35, 0.50)  # of the three sizes, half-way through the clip
MOTIONS = (
    "left",
    "right",
    "up",
    "down",
    "up-left",
    "up-right",
    "down-left",
    "down-right",
    "still",
    "growing",
    "shrinking",
    "spinning",
    "bouncing",
)
# (x, y) of each motion; y goes down.
DIRECTIONS = (
    (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, -1), (-1, 1), (1, 1),
    (0, 0), (0, 0), (0, 0), (0, 0), (0, 0),
)  # fmt: skip
ROUND_SHAPES = ("circle", "ring")  # spinning, they look still: never drawn

# One clip. Offsets, radius and speed are 0..255, the middle 127.5: small differences that no
# caption names. `mirrored`: the first object of two is in the right half instead of the left.
OBJECT_COLUMNS = (
    "shape", "color", "size", "motion", "offset_x", "offset_y", "radius", "speed",
)  # fmt: skip
COLUMNS = (
    "count",
    "background",
    "mirrored",
    *(f"{name}_1" for name in OBJECT_COLUMNS),
    *(f"{name}_2" for name in OBJECT_COLUMNS),  # all 0 where count is 1
)
# One caption. verb_k picks one of the ways to say a motion. size_k: 0 says nothing about the size,
# 1.. picks one of the words for it.
WORDING_COLUMNS = ("phrasing", "verb_1", "verb_2", "size_1", "size_2")

TRAVEL = 0.42  # each way from the middle, of half the frame's side
TRAVEL_OF_TWO = 0.22  # the same sideways and diagonally, where each has half of the frame
GROWTH = 0.45  # the radius goes from exp(-0.45) to exp(0.45) of its middle value
SPIN_RAD = math.pi  # clockwise over the clip: 11 degrees a frame of 17, far from any symmetry
DROP = 0.95  # height of a bounce, of half the frame's height
RADIUS_JITTER = 0.04
SPEED_JITTER = 0.1
HOLD_OUT_EVERY = 7  # about one in seven combinations of colour, shape and motion
TWO_OBJECTS = 0.35  # share of clips with two objects, where nothing else is said

CHUNK_PX = 2**26  # pixels drawn at once: temporaries of 256 MiB, few waits for the host


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def column(rows: Tensor, name: str) -> Tensor:
    """One named column of clips [B, 19] or wordings [B, 5], as int64 [B]."""
    names = COLUMNS if rows.shape[1] == len(COLUMNS) else WORDING_COLUMNS
    return rows[:, names.index(name)].long()


def is_held_out(color: Tensor, shape: Tensor, motion: Tensor) -> Tensor:
    """Whether a combination of indices is kept from training: bool, shaped as the arguments."""
    return (color + 2 * shape + 3 * motion) % HOLD_OUT_EVERY == 0


def sample_attributes(
    count: int,
    generator: torch.Generator,
    split: Split = "train",
    two_objects: float = TWO_OBJECTS,
) -> Tensor:
    """Draws `count` clips: int16 [B, 19], columns as in COLUMNS, on the generator's device.

    Every object's combination of colour, shape and motion is of `split`. `two_objects` is the
    share of clips with two objects. All colours in a clip differ.
    """
    device = generator.device
    two = torch.rand(count, generator=generator, device=device) < two_objects
    first = _sample_object(count, generator, split)
    second = _sample_object(count, generator, split, other_color=first[:, 1])
    for triple in (first, second):  # a large one that grows would cover its neighbour
        grows = (triple[:, 3] == MOTIONS.index("growing")) | (
            triple[:, 3] == MOTIONS.index("shrinking")
        )
        triple[:, 2] = torch.where(two & grows, triple[:, 2].clamp(max=1), triple[:, 2])
    second *= two[:, None]

    score = torch.rand(count, len(COLORS), generator=generator, device=device)
    score.scatter_(1, first[:, 1:2], -1.0)
    score.scatter_(1, torch.where(two[:, None], second[:, 1:2], first[:, 1:2]), -1.0)
    mirrored = torch.randint(2, (count,), generator=generator, device=device) * two
    head = torch.stack([1 + two.long(), score.argmax(1), mirrored], 1)
    return torch.cat([head, first, second], 1).to(torch.int16)


def _sample_object(
    count: int, generator: torch.Generator, split: Split, other_color: Tensor | None = None
) -> Tensor:
    """int64 [B, 8], columns as in OBJECT_COLUMNS; of another colour than `other_color` [B]."""
    device = generator.device
    allowed = combinations(split).to(device)  # [n, 3]
    draws = 1 if other_color is None else 16  # one of 16 differs but once in 10^12 clips
    pick = torch.randint(len(allowed), (count, draws), generator=generator, device=device)
    triples = allowed[pick]  # [B, draws, 3]
    if other_color is not None:
        differs = (triples[:, :, 0] != other_color[:, None]).long()
        assert bool(differs.any(1).all()), "16 draws in a row of the same colour"
        best = differs.argmax(1)
        triples = triples[torch.arange(count, device=device), best][:, None]
    color, shape, motion = triples[:, 0].unbind(1)
    size = torch.randint(len(SIZES), (count,), generator=generator, device=device)
    jitter = torch.randint(256, (count, 4), generator=generator, device=device)
    return torch.cat([torch.stack([shape, color, size, motion], 1), jitter], 1)


@functools.cache
def combinations(split: Split) -> Tensor:
    """All (color, shape, motion) of a split, int64 [n, 3]; no round shape spins."""
    every = torch.cartesian_prod(
        torch.arange(len(COLORS)), torch.arange(len(SHAPES)), torch.arange(len(MOTIONS))
    )
    color, shape, motion = every.unbind(1)
    is_round = torch.isin(shape, torch.tensor([SHAPES.index(name) for name in ROUND_SHAPES]))
    drawn = ~(is_round & (motion == MOTIONS.index("spinning")))
    of_split = is_held_out(color, shape, motion) == (split == "held_out")
    return every[drawn & of_split]


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def render(attributes: Tensor, frames: int = 17, height: int = 128, width: int = 128) -> Tensor:
    """Draws clips [B, 19] as fp32 [B, 3, F, H, W] in [-1, 1], on the device of `attributes`.

    Edges are one pixel wide. The second object is drawn over the first.
    """
    out = torch.empty(len(attributes), 3, frames, height, width, device=attributes.device)
    chunk = max(1, CHUNK_PX // (frames * height * width))
    for start in range(0, len(attributes), chunk):
        rows = attributes[start : start + chunk]
        _paint(rows, out[start : start + chunk])
    return out


def palette(device: torch.device | str = "cpu") -> Tensor:
    """The colours in the order of COLORS: fp32 [12, 3] in [-1, 1]."""
    return torch.tensor(list(PALETTE.values()), device=device) / 127.5 - 1


def _paint(rows: Tensor, canvas: Tensor) -> None:
    """Draws the clips `rows` into `canvas` [B, 3, F, H, W]."""
    colors = palette(rows.device)
    canvas[:] = colors[column(rows, "background")][:, :, None, None, None]
    frames, height, width = canvas.shape[2:]
    for which in (1, 2):
        poses = _poses(rows, which, frames, height, width)
        shapes = column(rows, f"shape_{which}")
        present = column(rows, "count") >= which
        ink = colors[column(rows, f"color_{which}")]
        for shape, name in enumerate(SHAPES):
            clips = (present & (shapes == shape)).nonzero()[:, 0]
            if len(clips):
                cover = _coverage(name, poses.of(clips), height, width)[:, None]
                below = canvas[clips]
                canvas[clips] = torch.lerp(below, ink[clips][:, :, None, None, None], cover)


@dataclass(frozen=True, slots=True)
class _Poses:
    """Where one object of each clip is in each frame: fp32 [N, F] each."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor  # radians, clockwise

    def of(self, clips: Tensor) -> _Poses:
        return _Poses(self.x[clips], self.y[clips], self.radius[clips], self.angle[clips])


def _poses(rows: Tensor, which: int, frames: int, height: int, width: int) -> _Poses:
    """The path of object `which` (1 or 2) of each clip."""
    device = rows.device
    short = min(height, width)
    half = torch.tensor([width / short, height / short], device=device)  # of the frame
    time = torch.arange(frames, device=device) * (2 / max(frames - 1, 1)) - 1  # [F]
    motion = column(rows, f"motion_{which}")
    two = column(rows, "count") == 2

    radius = torch.tensor(RADII, device=device)[column(rows, f"size_{which}")]
    radius = radius * (1 + RADIUS_JITTER * _jitter(rows, f"radius_{which}"))
    speed = 1 + SPEED_JITTER * _jitter(rows, f"speed_{which}")
    growth = (motion == MOTIONS.index("growing")).float()
    growth = GROWTH * (growth - (motion == MOTIONS.index("shrinking")).float())
    radii = radius[:, None] * torch.exp(growth[:, None] * time)

    direction = torch.tensor(DIRECTIONS, device=device).float()[motion]  # [B, 2]
    travel = _travel(direction, two) * half * speed[:, None]
    middle = _middle(rows, which, direction, radius * torch.exp(growth.abs()), half)
    x = middle[:, :1] + travel[:, :1] * time
    y = middle[:, 1:] + travel[:, 1:] * time

    # A ball: two equal falls and rises, parabolas, down to the lower edge of the frame.
    phase = (time + 1) % 1.0
    height_share = (2 * phase - 1) ** 2
    floor = (half[1] - radius)[:, None]
    drop = torch.minimum(DROP * half[1] * speed[:, None], 2 * floor)
    bounces = (motion == MOTIONS.index("bouncing"))[:, None]
    y = torch.where(bounces, floor - drop * height_share, y)

    spins = (motion == MOTIONS.index("spinning")).float()[:, None]
    return _Poses(x, y, radii, spins * SPIN_RAD * (time + 1) / 2)


def _jitter(rows: Tensor, name: str) -> Tensor:
    """A column of 0..255 as fp32 in [-1, 1]."""
    return column(rows, name).float() / 127.5 - 1


def _travel(direction: Tensor, two: Tensor) -> Tensor:
    """How far each way, as a share of half the frame, fp32 [B, 2]."""
    sideways = direction[:, 0] != 0
    share = torch.where(two & sideways, TRAVEL_OF_TWO, TRAVEL)
    return direction * share[:, None]


def _middle(rows: Tensor, which: int, direction: Tensor, reach: Tensor, half: Tensor) -> Tensor:
    """The centre half-way through the clip, fp32 [B, 2]. `reach` [B] is the largest radius."""
    offset = torch.stack(
        [_jitter(rows, f"offset_x_{which}"), _jitter(rows, f"offset_y_{which}")], 1
    )
    free = 0.7 * (half - reach[:, None]).clamp(min=0)  # wholly in the frame
    moves = direction != 0
    room = torch.where(moves, 0.06 * half, free)
    two = column(rows, "count") == 2
    room_x = torch.where(two, 0.04 * half[0], room[:, 0])
    side = torch.where(column(rows, "mirrored") == which - 1, -0.5, 0.5) * half[0]
    x = torch.where(two, side, 0.0) + offset[:, 0] * room_x
    return torch.stack([x, offset[:, 1] * room[:, 1]], 1)


def _coverage(name: str, poses: _Poses, height: int, width: int) -> Tensor:
    """How much of each pixel the object covers: fp32 [N, F, H, W] in [0, 1]."""
    device, short = poses.x.device, min(height, width)
    columns = (torch.arange(width, device=device) + 0.5 - width / 2) * (2 / short)
    lines = (torch.arange(height, device=device) + 0.5 - height / 2) * (2 / short)
    radius = poses.radius[:, :, None, None]
    x = (columns - poses.x[:, :, None, None]) / radius  # [N, F, 1, W]
    y = (lines[:, None] - poses.y[:, :, None, None]) / radius  # [N, F, H, 1]
    cos, sin = poses.angle.cos()[:, :, None, None], poses.angle.sin()[:, :, None, None]
    distance = signed_distance(name, cos * x + sin * y, cos * y - sin * x)
    return distance.mul_(radius * (-short / 2)).add_(0.5).clamp_(0, 1)


def signed_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the edge of a shape of radius about 1, negative inside.

    Exact near straight and round edges, which is all that a one-pixel edge needs; beyond an
    outer corner it is too small, so corners stay sharp. Formulas: plane geometry; the union is
    the minimum, the intersection the maximum.
    """
    return _DISTANCES[name](x, y)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.97


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.83


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, one corner up at 1.16; its centre of gravity is the origin."""
    return torch.maximum(x.abs() * math.sin(math.pi / 3) - y * 0.5, y) - 0.58


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points at 1.12, notches at 0.5: one edge, and the plane folded onto it."""
    tip, notch, sector = 1.12, 0.5, math.pi / 5
    angle = torch.atan2(x, -y)  # from straight up
    folded = torch.remainder(angle + sector, 2 * sector).sub_(sector).abs_()
    length = torch.hypot(x, y)
    notch_x, notch_y = notch * math.cos(sector), notch * math.sin(sector)
    edge = math.hypot(tip - notch_x, notch_y)
    normal_x, normal_y = notch_y / edge, (tip - notch_x) / edge
    along, across = length * folded.cos(), length * folded.sin()
    return (along - tip) * normal_x + across * normal_y


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    across, along = x.abs(), y.abs()
    upright = torch.maximum(across - 0.31, along - 1)
    return torch.minimum(upright, torch.maximum(along - 0.31, across - 1))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner, and two discs on the middles of its upper sides."""
    half, drop = 0.6, 0.265  # the drop puts its centre of gravity at the origin
    low, right = y - drop, x.abs()
    diamond = (right + low.abs()) * math.sqrt(0.5) - half
    middle = half * math.sqrt(0.5)
    return torch.minimum(diamond, torch.hypot(right - middle, low + middle) - half)


def _moon(x: Tensor, y: Tensor) -> Tensor:
    """A crescent open to the right: a disc less a smaller one, its centre of gravity at 0."""
    disc = torch.hypot(x - 0.39, y) - 1
    return torch.maximum(disc, 0.8 - torch.hypot(x - 0.87, y))


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
}


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------

SIZE_WORDS = {
    "small": ("small", "small", "little"),
    "medium": ("medium", "medium", "medium"),
    "large": ("large", "large", "big"),
}
# What an object does ("it ..."), and what it is seen doing ("it is ..."), as pairs.
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "still": (
        ("stands still", "standing still"),
        ("stays still", "staying still"),
        ("is still", "still"),
        ("does not move", "not moving"),
        ("is motionless", "motionless"),
    ),
    "growing": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("gets larger", "getting larger"),
        ("grows bigger", "growing bigger"),
        ("expands", "expanding"),
    ),
    "shrinking": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "spinning": (
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("turns", "turning"),
        ("spins around", "spinning around"),
        ("turns around", "turning around"),
    ),
    "bouncing": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("jumps up and down", "jumping up and down"),
    ),
    "up": (
        ("moves up", "moving up"),
        ("goes up", "going up"),
        ("moves upward", "moving upward"),
        ("slides up", "sliding up"),
        ("rises", "rising"),
    ),
    "down": (
        ("moves down", "moving down"),
        ("goes down", "going down"),
        ("moves downward", "moving downward"),
        ("slides down", "sliding down"),
        ("falls", "falling"),
    ),
    **{
        side: (
            (f"moves to the {side}", f"moving to the {side}"),
            (f"moves {side}", f"moving {side}"),
            (f"goes {side}", f"going {side}"),
            (f"slides to the {side}", f"sliding to the {side}"),
            (f"drifts {side}", f"drifting {side}"),
        )
        for side in ("left", "right")
    },
    **{
        f"{way}-{side}": (
            (f"moves {way} and to the {side}", f"moving {way} and to the {side}"),
            (f"moves {way} and {side}", f"moving {way} and {side}"),
            (f"moves diagonally {way} and {side}", f"moving diagonally {way} and {side}"),
            (f"goes {way} and to the {side}", f"going {way} and to the {side}"),
            (f"moves to the {corner} {side}", f"moving to the {corner} {side}"),
        )
        for way, corner in (("up", "upper"), ("down", "lower"))
        for side in ("left", "right")
    },
}
# {a}: the article before the size, or before the colour where no size is named; {an}: before the
# colour always; {size,}: the size and a comma. The digit is the object, 0 the background.
ONE_OBJECT = (
    "{a1} {size1} {color1} {shape1} {moves1} on {an0} {color0} background",
    "{size1} {color1} {shape1} {moving1} over {color0}",
    "on {an0} {color0} background, {a1} {size1} {color1} {shape1} {moves1}",
    "{an1} {color1} {shape1}, {size,1} {moving1}, {color0} background",
    "{a1} {size1} {color1} {shape1} is {moving1} on {an0} {color0} background",
    "{an0} {color0} background with {a1} {size1} {color1} {shape1} {moving1}",
    "the {size1} {color1} {shape1} {moves1}, the background is {color0}",
    "{an1} {color1} {shape1} {moving1} on {color0}",
    "there is {a1} {size1} {color1} {shape1} {moving1} in front of {an0} {color0} background",
    "{a1} {size1} {color1} {shape1}. it {moves1}. the background is {color0}.",
    "{size1} {color1} {shape1}, {moving1}, on {an0} {color0} background",
    "{color0} background, {a1} {size1} {color1} {shape1} {moves1}",
    "{a1} {size1} {color1} {shape1} that {moves1} against {an0} {color0} background",
    "on {color0}, {a1} {size1} {color1} {shape1} {moves1}",
    "on {color0} {a1} {size1} {color1} {shape1} {moving1}",
    "against {color0}, {size1} {color1} {shape1} {moving1}",
    "in front of {color0}, {an1} {color1} {shape1} {moves1}",
    "over {an0} {color0} background {a1} {size1} {color1} {shape1} {moves1}",
    "{color0}, with {a1} {size1} {color1} {shape1} {moving1}",
    "the background is {color0} and {a1} {size1} {color1} {shape1} {moves1}",
    "the background is {color0}. {a1} {size1} {color1} {shape1} {moves1}.",
    "there is {an0} {color0} background and {a1} {size1} {color1} {shape1} that is {moving1}",
    "{moving1} on {an0} {color0} background, {a1} {size1} {color1} {shape1}",
    "{a1} {size1} {color1} {shape1} {moves1} over {color0}",
    "{a1} {size1} {color1} {shape1}, {color0} background, {moving1}",
    "{size1} {color1} {shape1} {moves1}, {color0} background",
    "{an1} {color1} {shape1} is {moving1} against {color0}",
    "over {color0}, {a1} {size1} {color1} {shape1} is {moving1}",
)
TWO_OBJECT = (
    "{a1} {size1} {color1} {shape1} {moves1} and {a2} {size2} {color2} {shape2} {moves2}"
    " on {an0} {color0} background",
    "{size1} {color1} {shape1} {moving1} and {size2} {color2} {shape2} {moving2} over {color0}",
    "on {an0} {color0} background, {a1} {size1} {color1} {shape1} {moves1}"
    " and {a2} {size2} {color2} {shape2} {moves2}",
    "{a1} {size1} {color1} {shape1} {moves1} while {a2} {size2} {color2} {shape2} {moves2},"
    " the background is {color0}",
    "{an0} {color0} background with {a1} {size1} {color1} {shape1} {moving1}"
    " and {a2} {size2} {color2} {shape2} {moving2}",
    "{a1} {size1} {color1} {shape1} {moves1}. {a2} {size2} {color2} {shape2} {moves2}."
    " the background is {color0}.",
    "{a1} {size1} {color1} {shape1} is {moving1}, {a2} {size2} {color2} {shape2} is {moving2},"
    " {color0} background",
    "on {color0}, {a1} {size1} {color1} {shape1} {moves1}"
    " and {a2} {size2} {color2} {shape2} {moves2}",
    "against {color0}, {size1} {color1} {shape1} {moving1}, {size2} {color2} {shape2} {moving2}",
    "the background is {color0}. {a1} {size1} {color1} {shape1} {moves1}"
    " and {a2} {size2} {color2} {shape2} {moves2}.",
    "there is {a1} {size1} {color1} {shape1} {moving1}"
    " and {a2} {size2} {color2} {shape2} {moving2} over {color0}",
    "{a1} {size1} {color1} {shape1} {moving1} and {a2} {size2} {color2} {shape2} {moving2}"
    " on {an0} {color0} background",
)
PHRASINGS = ONE_OBJECT + TWO_OBJECT
# Never used in training: the last of each kind.
HELD_OUT_PHRASINGS = (len(ONE_OBJECT) - 1, len(PHRASINGS) - 1)

SPECIAL_WORDS = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3
PAD_ID, EOS_ID = 0, 1
VERB_DRAWS = 60  # divides by every number of ways to say a motion, 3 and 5
SIZE_DRAWS = 3  # words for each size


def sample_wording(
    attributes: Tensor, generator: torch.Generator, split: Split = "train"
) -> Tensor:
    """Draws how to tell each clip: int16 [B, 5], columns as in WORDING_COLUMNS.

    The size goes unsaid for half of the medium objects and an eighth of the others. "held_out"
    uses only the phrasings that training never sees.
    """
    device, count = generator.device, len(attributes)
    two = column(attributes, "count").to(device) == 2
    draw = torch.rand(count, generator=generator, device=device)
    if split == "held_out":
        phrasing = torch.where(two, HELD_OUT_PHRASINGS[1], HELD_OUT_PHRASINGS[0])
    else:
        of_two = len(ONE_OBJECT) + (draw * (len(TWO_OBJECT) - 1)).long()
        phrasing = torch.where(two, of_two, (draw * (len(ONE_OBJECT) - 1)).long())
    verbs = torch.randint(VERB_DRAWS, (count, 2), generator=generator, device=device)
    words = torch.randint(1, SIZE_DRAWS + 1, (count, 2), generator=generator, device=device)
    sizes = torch.stack([column(attributes, f"size_{k}").to(device) for k in (1, 2)], 1)
    unsaid = torch.rand(count, 2, generator=generator, device=device)
    unsaid_share = torch.where(sizes == SIZES.index("medium"), 0.5, 0.125)
    words = words * (unsaid >= unsaid_share)
    words[:, 1] *= two
    verbs[:, 1] *= two
    return torch.cat([phrasing[:, None], verbs, words], 1).to(torch.int16).to(attributes.device)


def sizes_named(wording: Tensor) -> Tensor:
    """Whether each caption names the size of object 1 and 2: bool [B, 2]."""
    fields = [
        [f"{{size{k}}}" in text or f"{{size,{k}}}" in text for k in (1, 2)] for text in PHRASINGS
    ]
    has_place = torch.tensor(fields, device=wording.device)[column(wording, "phrasing")]
    said = torch.stack([column(wording, f"size_{k}") > 0 for k in (1, 2)], 1)
    return has_place & said


def caption(attributes: Tensor, wording: Tensor) -> str:
    """The caption of one clip: `attributes` [19], `wording` [5]. Lower case, one line."""
    grammar = _grammar()
    values = _field_values(attributes[None].cpu(), wording[None].cpu())[0]
    slots = grammar.slots[int(wording[0])]
    phrases = [grammar.phrases[int(grammar.first_phrase[s] + values[s])] for s in slots.tolist()]
    text = " ".join(phrase for phrase in phrases if phrase)
    return re.sub(r" ([,.])", r"\1", text)


def tokenise_batch(attributes: Tensor, wording: Tensor) -> tuple[Tensor, Tensor]:
    """The token ids of the captions of a batch, as the tokenizer gives them, padded to S.

    attributes [B, 19], wording [B, 5] -> ids int64 [B, S], mask bool [B, S] (True: a token),
    S = `caption_tokens()`, on the device of `attributes`. No strings are made.
    """
    grammar, device = _grammar(), attributes.device
    values = _field_values(attributes, wording)  # [B, fields]
    slots = grammar.slots.to(device)[column(wording, "phrasing")]  # [B, P]
    phrase = grammar.first_phrase.to(device)[slots] + values.gather(1, slots)
    ids = grammar.phrase_ids.to(device)[phrase].flatten(1)  # [B, P * words], with holes
    order = (ids == PAD_ID).to(torch.uint8).argsort(dim=1, stable=True)
    ids = ids.gather(1, order)[:, : caption_tokens()]
    return ids, ids != PAD_ID


def empty_captions(count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """What `tokenise_batch` gives for the empty prompt: one end token in each row."""
    ids = torch.full((count, caption_tokens()), PAD_ID, device=device)
    ids[:, 0] = EOS_ID
    return ids, ids != PAD_ID


def caption_tokens() -> int:
    """S: the length of the longest caption that the grammar can make, its end token included."""
    return _grammar().longest


def words() -> tuple[str, ...]:
    """Every word of the grammar, special words first: the id of a word is its place."""
    return _grammar().words


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The phrasings as tables. A slot is a place in a phrasing, a field is what fills it."""

    words: tuple[str, ...]
    phrases: tuple[str, ...]  # what a field can say, all fields in one list
    phrase_ids: Tensor  # int64 [phrases, most words], PAD_ID where shorter
    first_phrase: Tensor  # int64 [fields]: where a field's phrases begin
    slots: Tensor  # int64 [phrasings, P]: the field of each slot
    longest: int  # tokens


def _variable_fields() -> dict[str, tuple[str, ...]]:
    """What each {field} can say; `_field_values` gives the index into it, in the same order."""
    finite, seen = [], []
    for motion in MOTIONS:
        ways = VERBS[motion]
        finite += [ways[draw % len(ways)][0] for draw in range(VERB_DRAWS)]
        seen += [ways[draw % len(ways)][1] for draw in range(VERB_DRAWS)]
    sizes = ("", *(word for size in SIZES for word in SIZE_WORDS[size]))
    fields: dict[str, tuple[str, ...]] = {"{an0}": ("a", "an"), "{color0}": COLORS}
    for k in (1, 2):
        fields |= {
            f"{{a{k}}}": ("a", "an"),
            f"{{an{k}}}": ("a", "an"),
            f"{{size{k}}}": sizes,
            f"{{size,{k}}}": tuple(f"{word} ," if word else "" for word in sizes),
            f"{{color{k}}}": COLORS,
            f"{{shape{k}}}": SHAPES,
            f"{{moves{k}}}": tuple(finite),
            f"{{moving{k}}}": tuple(seen),
        }
    return fields


def _field_values(attributes: Tensor, wording: Tensor) -> Tensor:
    """Which of its phrases each field says, int64 [B, fields]; a literal has only one."""
    ground = column(attributes, "background")
    orange = COLORS.index("orange")  # the one colour that takes "an"
    values = [(ground == orange).long(), ground]
    for k in (1, 2):
        color = column(attributes, f"color_{k}")
        said = column(wording, f"size_{k}")
        size = (column(attributes, f"size_{k}") * SIZE_DRAWS + said) * (said > 0)
        verb = column(attributes, f"motion_{k}") * VERB_DRAWS + column(wording, f"verb_{k}")
        an = (color == orange).long()
        shape = column(attributes, f"shape_{k}")
        values += [an * (said == 0), an, size, size, color, shape, verb, verb]
    literals = len(_grammar().first_phrase) - len(values)
    return torch.nn.functional.pad(torch.stack(values, 1), (0, literals))


@functools.cache
def _grammar() -> _Grammar:
    parsed = [re.findall(r"\{[^}]*\}|\w+|[,.]", text) for text in PHRASINGS]
    fields = _variable_fields()
    for token in sorted({"", *(token for slots in parsed for token in slots)}):
        fields.setdefault(token, (token,))  # literals, and the empty one that pads a phrasing

    phrases = tuple(phrase for variants in fields.values() for phrase in variants)
    vocabulary = sorted({word for phrase in phrases for word in phrase.split()})
    all_words = (*SPECIAL_WORDS, *vocabulary)
    ids = {word: i for i, word in enumerate(all_words)}

    most_words = max(len(phrase.split()) for phrase in phrases)
    lengths = [len(variants) for variants in fields.values()]
    names = list(fields)
    most_slots = max(len(slots) for slots in parsed)
    end = len(phrases)  # one more phrase, the end token, in a field of its own
    rows = [[ids[word] for word in phrase.split()] for phrase in phrases] + [[EOS_ID]]
    padded = [row + [PAD_ID] * (most_words - len(row)) for row in rows]
    slots_by_phrasing = [
        [names.index(token) for token in slots] + [names.index("")] * (most_slots - len(slots))
        for slots in parsed
    ]
    longest = max(
        sum(max(len(phrase.split()) for phrase in fields[token]) for token in slots)
        for slots in parsed
    )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return _Grammar(
        words=all_words,
        phrases=(*phrases, ""),  # the end token is not text
        phrase_ids=torch.tensor(padded),
        first_phrase=torch.tensor([*starts, end]),
        slots=torch.tensor([[*slots, len(names)] for slots in slots_by_phrasing]),
        longest=longest + 1,
    )


def build_tokenizer() -> Tokenizer:
    """The tokenizer of the demo model: one token per word or mark, `</s>` at the end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS_ID)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_WORDS))
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """Writes tokenizer.json, which `tokenizers` and transformers read."""
    build_tokenizer().save(str(path))


def sample_batch(
    count: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    *,
    frames: int = 17,
    height: int = 128,
    width: int = 128,
    split: Split = "train",
    two_objects: float = TWO_OBJECTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws clips and captions: (frames, ids, mask, attributes), all on `device`.

    frames fp32 [B, 3, F, H, W] in [-1, 1]; ids int64 and mask bool [B, S]; attributes int16
    [B, 19]. "held_out" holds out both the combinations and the phrasings.
    """
    attributes = sample_attributes(count, generator, split, two_objects)
    wording = sample_wording(attributes, generator, split)
    attributes = attributes.to(device)
    ids, mask = tokenise_batch(attributes, wording.to(device))
    return render(attributes, frames, height, width), ids, mask, attributes
