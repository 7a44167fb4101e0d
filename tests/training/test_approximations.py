"""The arithmetic of `benchmarks.approximations`: its clips are made elsewhere, by the engine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.approximations import Row, compare, modes, picked, plot
from benchmarks.demo_quality import Outcome, Settings
from training.analyser import ClipScore, ClipSeen, ObjectScore
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, ModelSpec


def outcome(*levels: int, right: bool = True, elapsed_s: float = 1.0) -> Outcome:
    """A clip of one grey level for each frame."""
    frames = np.stack([np.full((4, 4, 3), level, np.uint8) for level in levels])
    (task,) = picked(DEMO, 0, 1)
    one = ObjectScore(color=right, shape=right, size=None, motion=right)
    score = ClipScore(background=True, count=True, objects=(one,), exchanged=False)
    return Outcome(task, frames, ClipSeen(0, ()), score, None, elapsed_s)


def test_the_mean_and_the_worst_are_of_single_frames() -> None:
    exact = [outcome(100, 100), outcome(100, 100)]
    made = [outcome(100, 104, right=False), outcome(102, 102, elapsed_s=3.0)]
    row = compare("x", made, exact, timed=True)
    by_frame = [99.0, *(10 * math.log10(255**2 / square) for square in (16, 4, 4))]
    assert row.mean_db == pytest.approx(np.mean(by_frame))
    assert row.worst_db == pytest.approx(by_frame[1])
    assert row.right["background"] == 100
    assert row.right["shape"] == row.right["all right"] == 50
    assert row.relative_s == 2
    assert compare("exact", exact, exact, timed=False).mean_db is None


@pytest.mark.parametrize("spec", [DEMO, DEMO_T2V, DEMO_I2V], ids=lambda spec: spec.name)
def test_every_mode_changes_one_thing(spec: ModelSpec, tmp_path: Path) -> None:
    exact = Settings(
        spec=spec, weights=None, experts=None, device="cpu", precision="fp32", size=(128, 128),
        frames=17, steps=None, guidance=None, keep_frames=True,
    )  # fmt: skip
    first, *others = modes(exact, tmp_path)
    assert first.settings == exact
    assert len({mode.settings for mode in others}) == len(others)
    for mode in others:
        assert mode.settings != exact
        back = replace(
            mode.settings, precision="fp32", weights=None, steps=None, guidance=None,
            guidance_low=None, tile_px=None,
        )  # fmt: skip
        assert back == exact


def test_prompts_are_from_all_groups() -> None:
    assert {task.group for task in picked(DEMO, 0, 5)} == {
        "combination", "phrasing", "both", "two", "image",
    }  # fmt: skip
    assert len(picked(DEMO_I2V, 0, 3)) == 3


def test_the_plot_shows_a_better_mode_with_a_longer_bar(tmp_path: Path) -> None:
    right = {"all right": 50.0}
    rows = [Row("exact", None, None, right, None), Row("good", 60.0, 50.0, right, None)]
    rows.append(Row("bad", 20.0, 10.0, right, None))
    plot(rows, "title", tmp_path / "plot.png")
    pixels = np.array(Image.open(tmp_path / "plot.png")).astype(int)
    blue = (pixels[:, :, 2] - pixels[:, :, 0] > 80).sum(axis=1)
    lengths = [int(length) for length in blue if length > 50]
    assert lengths[0] > 2 * lengths[-1]
