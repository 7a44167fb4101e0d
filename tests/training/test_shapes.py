"""The demo model's world: clips are drawn as their rows say, and captions say what is drawn.

Dims: B clips, F frames, H W pixels, S tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training import shapes
from training.shapes import (
    COLORS,
    COLUMNS,
    HELD_OUT_PHRASINGS,
    MOTIONS,
    ONE_OBJECT,
    PHRASINGS,
    ROUND_SHAPES,
    SHAPES,
    Split,
    build_tokenizer,
    caption,
    column,
    empty_captions,
    is_held_out,
    palette,
    render,
    sample_attributes,
    sample_batch,
    sample_wording,
    sizes_named,
    tokenise_batch,
    words,
    write_tokenizer,
)
from wanfit.engine.tokenizer import TextTokenizer
from wanfit.specs import DEMO


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(shape: str, motion: str = "still", size: int = 1, **more: int) -> Tensor:
    """One red object in the middle of a white frame, [1, 19]; `more` sets columns by name."""
    values = dict.fromkeys(COLUMNS, 128) | {
        "count": 1, "background": COLORS.index("white"), "mirrored": 0, "color_1": 0,
        "shape_1": SHAPES.index(shape), "motion_1": MOTIONS.index(motion), "size_1": size,
        "color_2": COLORS.index("blue"), "shape_2": 0, "motion_2": 8, "size_2": 0,
    }  # fmt: skip
    return torch.tensor([list((values | more).values())], dtype=torch.int16)


def inked(frame: Tensor) -> Tensor:
    """Where a frame [3, H, W] is nearer to red than to white: bool [H, W]."""
    return frame[1] < (palette()[0, 1] + palette()[COLORS.index("white"), 1]) / 2


def center(frame: Tensor) -> tuple[float, float]:
    lines, columns = inked(frame).nonzero().float().mean(0).tolist()
    return columns, lines


def extent(frame: Tensor) -> tuple[int, int]:
    """(width, height) of what is inked, px."""
    mask = inked(frame)
    return int(mask.any(0).sum()), int(mask.any(1).sum())


# --- rows


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_object_is_of_the_split_asked_for(split: Split) -> None:
    rows = sample_attributes(2000, draw(0), split, two_objects=0.5)
    two = column(rows, "count") == 2
    assert 0.45 < two.float().mean() < 0.55
    for k in (1, 2):
        there = rows if k == 1 else rows[two]
        held = is_held_out(*(column(there, f"{name}_{k}") for name in ("color", "shape", "motion")))
        assert bool((held == (split == "held_out")).all())


def test_about_one_in_seven_combinations_is_held_out() -> None:
    held, trained = len(shapes.combinations("held_out")), len(shapes.combinations("train"))
    assert 1 / 8 < held / (held + trained) < 1 / 6


def test_every_word_of_the_world_is_drawn_in_training_and_held_out() -> None:
    for split in ("train", "held_out"):
        color, shape, motion = shapes.combinations(split).unbind(1)
        assert len(color.unique()) == len(COLORS)
        assert len(shape.unique()) == len(SHAPES)
        assert len(motion.unique()) == len(MOTIONS)


def test_the_colours_of_a_clip_all_differ() -> None:
    rows = sample_attributes(2000, draw(1), two_objects=1.0)
    ground, first, second = (column(rows, n) for n in ("background", "color_1", "color_2"))
    assert not bool(((ground == first) | (ground == second) | (first == second)).any())


def test_no_disc_or_ring_spins_since_nobody_could_see_it() -> None:
    rows = sample_attributes(4000, draw(2), two_objects=0.0)
    spins = column(rows, "motion_1") == MOTIONS.index("spinning")
    assert bool(spins.any())
    for name in ROUND_SHAPES:
        assert not bool((spins & (column(rows, "shape_1") == SHAPES.index(name))).any())


def test_a_seed_gives_the_same_batch_again_and_another_seed_another() -> None:
    first, again, other = (
        sample_batch(3, draw(seed), frames=5, height=32, width=32) for seed in (7, 7, 8)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[3], other[3])


# --- drawing


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 128, 128), (9, 96, 160), (5, 64, 32)])
def test_frames_have_the_size_asked_for_and_stay_in_range(
    frames: int, height: int, width: int
) -> None:
    clips = render(sample_attributes(4, draw(3)), frames, height, width)
    assert clips.shape == (4, 3, frames, height, width)
    assert clips.dtype == torch.float32
    assert clips.min() >= -1
    assert clips.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (160, 96), (192, 128)])
def test_a_circle_is_round_and_as_large_as_the_shorter_side_says(height: int, width: int) -> None:
    frame = render(row("circle", size=2), 1, height, width)[0, :, 0]
    wide, high = extent(frame)
    assert wide == high
    assert wide == pytest.approx(2 * 0.97 * 0.5 * min(height, width) / 2, abs=2)


def test_an_edge_is_one_pixel_wide() -> None:
    """Along a line through a square, at most one pixel on either side is neither ink nor ground."""
    line = render(row("square"), 1)[0, 1, 0, 64]
    ink, ground = palette()[0, 1], palette()[COLORS.index("white"), 1]
    between = ((line - ink).abs() > 1e-3) & ((line - ground).abs() > 1e-3)
    assert int(between.sum()) <= 2
    assert bool((line - ink).abs().min() < 1e-3)


def test_a_motion_covers_the_same_share_of_a_clip_of_any_length() -> None:
    rows = sample_attributes(12, draw(4))
    short, long = render(rows, 5, 64, 64), render(rows, 9, 64, 64)
    torch.testing.assert_close(short, long[:, :, ::2], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("motion", "right", "down"),
    [
        ("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1),
        ("up-left", -1, -1), ("up-right", 1, -1), ("down-left", -1, 1), ("down-right", 1, 1),
        ("still", 0, 0), ("spinning", 0, 0),
    ],
)  # fmt: skip
def test_an_object_goes_where_its_motion_says(motion: str, right: int, down: int) -> None:
    clip = render(row("heart", motion), 9)[0]
    (x0, y0), (x1, y1) = center(clip[:, 0]), center(clip[:, -1])
    travel = 0.84 * 64
    assert x1 - x0 == pytest.approx(right * travel, abs=2)
    assert y1 - y0 == pytest.approx(down * travel, abs=2)


def test_a_bounce_touches_the_floor_twice_and_comes_back() -> None:
    heights = [center(frame)[1] for frame in render(row("circle", "bouncing"), 17)[0].unbind(1)]
    assert heights[0] == pytest.approx(heights[8], abs=1)
    assert heights[0] == pytest.approx(heights[16], abs=1)
    assert heights[4] == pytest.approx(heights[12], abs=1)
    assert heights[4] - heights[0] > 40
    lowest = inked(render(row("circle", "bouncing"), 17)[0, :, 4]).any(1).nonzero().max()
    assert lowest >= 126


def test_growing_and_shrinking_are_the_same_clip_in_opposite_directions() -> None:
    grows, shrinks = (render(row("star", motion), 9)[0] for motion in ("growing", "shrinking"))
    torch.testing.assert_close(grows, shrinks.flip(1), atol=1e-4, rtol=0)
    assert extent(grows[:, -1])[0] > 2 * extent(grows[:, 0])[0]


def test_spinning_starts_upright_and_ends_upside_down() -> None:
    still, spins = render(row("triangle"), 9)[0], render(row("triangle", "spinning"), 9)[0]
    torch.testing.assert_close(spins[:, 0], still[:, 0])
    x, y = center(spins[:, 0])
    upside_down = inked(still[:, 0]).flip(0)
    shift = round(2 * (y - 63.5))
    assert (inked(spins[:, -1]) ^ upside_down.roll(shift, 0)).float().mean() < 0.02
    assert x == pytest.approx(63.5, abs=1)


def test_the_second_object_lies_over_the_first() -> None:
    """A small blue disc that comes near a large red square hides a part of it."""
    rows = row("square", "right", size=2, count=2, shape_2=1, size_2=2, motion_2=0)
    last = render(rows, 5)[0, :, -1]
    blue = (last - palette()[COLORS.index("blue")][:, None, None]).abs().sum(0) < 0.05
    red = (last - palette()[0][:, None, None]).abs().sum(0) < 0.05
    assert int(red.sum()) < 0.8 * int(blue.sum())


def test_clips_do_not_depend_on_their_batch() -> None:
    rows = sample_attributes(8, draw(5))
    whole = render(rows, 5, 64, 64)
    for i in (0, 3, 7):
        torch.testing.assert_close(render(rows[i : i + 1], 5, 64, 64)[0], whole[i])


# --- captions


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_ids_of_a_batch_are_those_of_the_tokenizer_on_the_captions(split: Split) -> None:
    rows = sample_attributes(400, draw(6), split, two_objects=0.5)
    wording = sample_wording(rows, draw(7), split)
    ids, mask = tokenise_batch(rows, wording)
    tokenizer = build_tokenizer()
    assert ids.shape == mask.shape == (400, shapes.caption_tokens())
    for i in range(len(rows)):
        text = caption(rows[i], wording[i])
        assert text == text.lower()
        encoded = tokenizer.encode(text)
        assert "<unk>" not in encoded.tokens, text
        assert encoded.ids == ids[i][mask[i]].tolist(), text


def test_the_longest_caption_fills_the_width_of_a_batch() -> None:
    """So S is neither too small nor too large."""
    rows = sample_attributes(6000, draw(8), two_objects=1.0)
    mask = tokenise_batch(rows, sample_wording(rows, draw(9)))[1]
    assert int(mask.sum(1).max()) == shapes.caption_tokens()


def test_two_phrasings_are_never_used_in_training_and_all_others_are() -> None:
    rows = sample_attributes(3000, draw(10), two_objects=0.5)
    used = set(column(sample_wording(rows, draw(11)), "phrasing").tolist())
    assert used == set(range(len(PHRASINGS))) - set(HELD_OUT_PHRASINGS)
    held = set(column(sample_wording(rows, draw(11), "held_out"), "phrasing").tolist())
    assert held == set(HELD_OUT_PHRASINGS)
    assert len(ONE_OBJECT) >= 11
    assert len(PHRASINGS) - len(ONE_OBJECT) >= 5


def test_captions_say_what_the_rows_hold() -> None:
    wording = torch.tensor([0, 0, 0, 1, 0], dtype=torch.int16)
    rows = row("star", "right", size=0)
    assert caption(rows[0], wording) == "a small red star moves to the right on a white background"
    orange = row("ring", "bouncing", color_1=COLORS.index("orange"))
    unsaid = torch.tensor([0, 0, 0, 0, 0], dtype=torch.int16)
    assert caption(orange[0], unsaid) == "an orange ring bounces on a white background"
    marks = torch.tensor([9, 0, 0, 3, 0], dtype=torch.int16)
    assert caption(orange[0], marks) == "a medium orange ring. it bounces. the background is white."


def test_a_size_is_named_where_the_caption_has_a_word_for_it() -> None:
    rows = sample_attributes(300, draw(12), two_objects=0.5)
    wording = sample_wording(rows, draw(13))
    sizes = {word for ways in shapes.SIZE_WORDS.values() for word in ways}
    for i, named in enumerate(sizes_named(wording).sum(1).tolist()):
        said = caption(rows[i], wording[i]).replace(",", " ").replace(".", " ")
        said = said.replace("gets bigger", "").replace("getting bigger", "")
        assert sum(word in sizes for word in said.split()) == named, said


def test_no_two_motions_share_a_verb() -> None:
    said = [way for ways in shapes.VERBS.values() for pair in ways for way in pair]
    assert len(said) == len(set(said))


def test_the_demo_models_embedding_has_a_row_for_every_word() -> None:
    assert len(words()) <= DEMO.umt5.vocab_size
    assert words()[:4] == ("<pad>", "</s>", "<s>", "<unk>")


def test_the_tokenizer_file_is_read_by_the_engine_and_names_unknown_words(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    engine = TextTokenizer(tmp_path / "tokenizer.json")
    assert engine.vocab_size == len(words())
    assert engine.encode("A red DRAGON spins").unknown_words == ("DRAGON",)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tuple(plain.encode("a blue star").ids) == engine.encode("A blue  star").ids


def test_transformers_reads_the_tokenizer_file(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    text = "a small red circle, spinning over black."
    assert theirs(text)["input_ids"] == build_tokenizer().encode(text).ids
    assert theirs.pad_token_id == 0
    assert theirs.eos_token_id == 1


def test_an_empty_caption_is_the_end_token_alone() -> None:
    ids, mask = empty_captions(2)
    assert build_tokenizer().encode("").ids == ids[0][mask[0]].tolist() == [1]
    assert ids.shape == (2, shapes.caption_tokens())
