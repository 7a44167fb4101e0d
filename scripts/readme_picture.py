"""Draws docs/images/demo.png: clips of the shipped demo model, each over its prompt.

python -m scripts.readme_picture
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from training.sheet import Strip, draw_sheet
from wanfit import generate

PICTURE = Path("docs/images/demo.png")
SEED = 7
PROMPTS = (
    "a small red circle moves to the right on a blue background",
    "large yellow star spinning over black",
    "a pink heart grows and a green square bounces on a white background",
    "a cyan moon drifts up and to the left over brown",
    "on an orange background, a blue ring shrinks",
    "a purple triangle falls while a white cross stands still, the background is gray",
)


def main() -> None:
    strips = []
    with tempfile.TemporaryDirectory() as scratch:
        for prompt in PROMPTS:
            clip = Path(scratch) / "clip.npy"
            generate(prompt, output=clip, seed=SEED)
            strips.append(Strip(np.load(clip), (prompt,)))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(strips, PICTURE)
    print(PICTURE)  # noqa: T201  what this script says


if __name__ == "__main__":
    main()
