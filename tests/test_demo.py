"""The model that ships with the package: what a newcomer's first command makes is what it says.

A few clips, through the public function, read by the analyser that the quality benchmark uses;
`benchmarks/demo_quality.py` counts hundreds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from training import shapes
from training.analyser import ClipSeen, ObjectSeen, analyse
from wanfit import generate
from wanfit.engine.models.tiles import join_bands
from wanfit.engine.weights.open import open_model
from wanfit.service import DEMO_DIRECTORY
from wanfit.specs import DEMO

Frames = npt.NDArray[np.uint8]

MAX_BYTES = 40_000_000  # each version stays in the repository's history


def clip(path: Path, prompt: str, **options: Any) -> Frames:
    """[F, H, W, 3] of a clip that the shipped model makes on the CPU, with seed 1."""
    generate(prompt, output=path / "clip.npy", seed=1, device="cpu", **options)
    frames: Frames = np.load(path / "clip.npy")
    return frames


def shown(background: str, *objects: str) -> ClipSeen:
    """What a clip shows, from words: "small red circle right"."""
    seen = []
    for words in objects:
        size, color, shape, motion = words.split()
        seen.append(
            ObjectSeen(
                color=shapes.COLORS.index(color),
                shape=shapes.SHAPES.index(shape),
                size=shapes.SIZES.index(size),
                motion=shapes.MOTIONS.index(motion),
            )
        )
    return ClipSeen(shapes.COLORS.index(background), tuple(seen))


def test_it_is_small_enough_to_ship() -> None:
    files = [file for file in DEMO_DIRECTORY.rglob("*") if file.is_file()]
    assert 1_000_000 < sum(file.stat().st_size for file in files) <= MAX_BYTES


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "a small red circle moves to the right on a blue background",
            shown("blue", "small red circle right"),
        ),
        ("large yellow star spinning over black", shown("black", "large yellow star spinning")),
    ],
)
def test_a_clip_shows_its_prompt(prompt: str, expected: ClipSeen, tmp_path: Path) -> None:
    assert analyse(clip(tmp_path, prompt)) == expected


def test_two_objects_keep_their_own_colours_and_motions(tmp_path: Path) -> None:
    prompt = "a small green square moves up and a small pink heart stands still on white"
    seen = analyse(clip(tmp_path, prompt))
    expected = shown("white", "small green square up", "small pink heart still")
    assert seen.background == expected.background
    assert {(o.color, o.shape, o.motion) for o in seen.objects} == {
        (o.color, o.shape, o.motion) for o in expected.objects
    }


def test_an_image_is_the_first_frame_and_the_prompt_moves_it(tmp_path: Path) -> None:
    """PSNR above 28 dB to the given image, and the motion of the prompt."""
    rows = shapes.sample_attributes(1, torch.Generator().manual_seed(4), two_objects=0.0)
    rows[:, shapes.COLUMNS.index("motion_1")] = shapes.MOTIONS.index("left")
    wording = torch.zeros(1, len(shapes.WORDING_COLUMNS), dtype=torch.int16)
    still = ((shapes.render(rows)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    frames = clip(tmp_path, shapes.caption(rows[0], wording[0]), image=Image.fromarray(still))
    error = np.mean((frames[0].astype(float) - still) ** 2)
    assert 10 * math.log10(255**2 / error) > 28
    assert shapes.MOTIONS[analyse(frames).objects[0].motion] == "left"


def test_other_sizes_and_lengths(tmp_path: Path) -> None:
    prompt = "a blue ring moves down on an orange background"
    frames = clip(tmp_path, prompt, size="160x96", num_frames=9)
    assert frames.shape == (9, 96, 160, 3)
    seen = analyse(frames)
    assert shapes.COLORS[seen.background] == "orange"
    assert shapes.COLORS[seen.objects[0].color] == "blue"
    assert shapes.MOTIONS[seen.objects[0].motion] == "down"


def test_tiles_of_a_trained_autoencoder_blend_into_the_same_picture() -> None:
    """Encoded and decoded in tiles of 96 px, a clip of 160x128 is that of the whole to 30 dB."""
    vae = open_model(DEMO_DIRECTORY, DEMO).load_vae(torch.device("cpu"), torch.float32)
    rows = shapes.sample_attributes(1, torch.Generator().manual_seed(8))
    frames = shapes.render(rows, 5, 128, 160)
    with torch.inference_mode():
        whole = torch.cat(list(vae.decode(vae.encode(frames))), dim=2)
        tiled = join_bands(vae.decode_tiles(vae.encode(frames, tile_px=96), 96))
    assert not torch.equal(tiled, whole)
    assert 10 * math.log10(4 / (tiled - whole).square().mean().item()) > 30


def test_words_that_it_does_not_know_are_told_in_one_line(tmp_path: Path) -> None:
    report = generate(
        "a red circle and a Zebra juggling, on blue",
        output=tmp_path / "clip.npy",
        num_inference_steps=1,
        device="cpu",
    )
    assert len(report.notices) == 1
    assert "Zebra, juggling" in report.notices[0]


@pytest.mark.gpu
def test_a_gpu_shows_the_same_clip_as_the_cpu(tmp_path: Path) -> None:
    """One seed, one clip: fp32 on both, and rounding leaves them more than 40 dB alike."""
    made = []
    for device in ("cpu", "cuda"):
        generate(
            "a small red circle moves to the right on a blue background",
            output=tmp_path / f"{device}.npy",
            seed=1,
            device=device,
            precision="fp32",
        )
        made.append(np.load(tmp_path / f"{device}.npy").astype(float))
    assert 10 * math.log10(255**2 / max(np.mean((made[0] - made[1]) ** 2), 1e-9)) > 40
