"""Whether each expert of a model does its own part: exchanged, and each used alone.

    python -m benchmarks.experts_apart --model demo-t2v [--weights DIR] [--workers 2] [--limit 20]

The prompts, the engine and the analyser are those of `benchmarks.demo_quality`; one row for each
arrangement of the two experts. Prints Markdown, and one line of JSON last. Left out: the same for
TI2V, which has one transformer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.demo_quality import (
    Maker,
    Outcome,
    Settings,
    all_tasks,
    do_all,
    percent_right,
    psnr_figures,
    read_experts,
)
from training import command
from wanfit.specs import DEMO_I2V, DEMO_T2V

ARRANGEMENTS = {  # who denoises above the boundary, and who below
    "high,low": "as they are",
    "low,high": "exchanged",
    "high,high": "the high-noise expert alone",
    "low,low": "the low-noise expert alone",
}


def shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Percent of clips and objects, as `demo_quality` counts them."""
    found = percent_right(outcomes)
    firsts = [o.first_frame_psnr_db for o in outcomes if o.first_frame_psnr_db is not None]
    if firsts:
        found["first frame, dB"] = psnr_figures("first", "", firsts)[0].value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts what two experts show, rearranged.")
    command.add_model(parser, DEMO_T2V, DEMO_I2V)
    parser.add_argument("--weights", type=Path, help="model directory; default: what ships")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, default=20, help="clips of each group of prompts")
    parser.add_argument("--seed", type=int, default=20_000)
    given = parser.parse_args()

    rows: dict[str, dict[str, float]] = {}
    for arrangement, title in ARRANGEMENTS.items():
        settings = Settings(
            spec=given.model,
            weights=given.weights,
            experts=read_experts(arrangement),
            device=given.device,
            precision="bf16" if given.device.startswith("cuda") else "fp32",
            size=given.model.presets[0],
            frames=given.model.sampling.num_frames,
            steps=None,
            guidance=None,
            keep_frames=False,
        )
        tasks = all_tasks(given.model, given.seed, given.limit)
        rows[title] = shares(list(do_all(Maker.make, tasks, Maker(settings), given.workers)))

    columns = list(next(iter(rows.values())))
    print(f"{given.model.name}, {len(tasks)} clips a row, percent right:\n")
    print(f"| experts | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for title, row in rows.items():
        print(f"| {title} | {' | '.join(f'{row[name]:.1f}' for name in columns)} |")
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
