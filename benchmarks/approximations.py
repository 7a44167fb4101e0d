"""What each approximation costs a demo model in quality, and what it saves.

    python -m benchmarks.approximations [--model demo] [--weights DIR] [--clips 4] [--workers 2]
        [--plot FILE.png]

Each mode that the engine has makes the same clips as the exact one, fp32 at the model's default
steps in one piece: PSNR against it, the mean over all frames of all clips and the worst of them;
what the analyser reads in the clips, as `benchmarks.demo_quality` counts it; and seconds a clip,
relative to the exact mode's, on a GPU alone, where nobody else works. PSNR says how far a picture
moved, the shares whether it still shows what was asked: fewer steps move it a lot and may change
nothing that a person asked for. Left out: the engine's cuts of rows and heads, which change no
result.

Prints Markdown for benchmarks/RESULTS.md, one line of JSON last, and draws the plot.

Dims: F frames, H W pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.demo_quality import (
    Maker,
    Outcome,
    Settings,
    Task,
    all_tasks,
    do_all,
    percent_right,
    psnr_db,
)
from training import command
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.locate import locate
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, ModelSpec

EQUAL_DB = 99.0  # what `psnr_db` says of equal frames


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to make the clips."""

    name: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Row:
    """What one mode costs and saves."""

    name: str
    mean_db: float | None  # None: the exact mode itself
    worst_db: float | None
    right: dict[str, float]  # percent
    relative_s: float | None  # median seconds of a clip, of the exact mode's; None: not counted


def modes(exact: Settings, fp8_store: Path) -> Iterator[Mode]:
    """The exact mode first, then every approximate one that the engine has."""
    yield Mode("exact: fp32", exact)
    yield Mode("bf16", replace(exact, precision="bf16"))
    yield Mode("fp8 weights, bf16 products", replace(exact, precision="fp8", weights=fp8_store))
    steps = exact.spec.sampling.num_inference_steps
    for share in (0.8, 0.6, 0.4, 0.2):
        fewer = round(share * steps)
        yield Mode(f"{fewer} steps instead of {steps}", replace(exact, steps=fewer))
    if exact.spec.boundary is not None:
        yield Mode("no guidance below the boundary", replace(exact, guidance_low=1.0))
    yield Mode("no guidance", replace(exact, guidance=1.0))
    for cells in (6, 4):
        tile_px = cells * exact.spec.vae.stride_px
        yield Mode(f"autoencoder in tiles of {tile_px} px", replace(exact, tile_px=tile_px))


def picked(spec: ModelSpec, seed: int, clips: int) -> list[Task]:
    """`clips` prompts, as evenly from all groups as their number allows."""
    groups: dict[str, list[Task]] = {}
    for task in all_tasks(spec, seed, clips):
        groups.setdefault(task.group, []).append(task)
    turns = itertools.zip_longest(*groups.values())
    return [task for turn in turns for task in turn if task is not None][:clips]


def compare(name: str, made: Sequence[Outcome], exact: Sequence[Outcome], *, timed: bool) -> Row:
    """One row of the table. `exact` are the exact mode's clips, of the same tasks."""
    by_frame = [
        psnr_db(frame, reference)
        for one, other in zip(made, exact, strict=True)
        for frame, reference in zip(_frames(one), _frames(other), strict=True)
    ]
    itself = made is exact
    seconds = [median(o.elapsed_s for o in outcomes) for outcomes in (made, exact)]
    return Row(
        name=name,
        mean_db=None if itself else mean(by_frame),
        worst_db=None if itself else min(by_frame),
        right=percent_right(made),
        relative_s=seconds[0] / seconds[1] if timed else None,
    )


def _frames(outcome: Outcome) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert outcome.frames is not None, "Settings.keep_frames"
    return outcome.frames


def print_table(rows: Sequence[Row]) -> None:
    shares = list(rows[0].right)
    print(f"| | mean, dB | worst frame, dB | {' | '.join(f'{s}, %' for s in shares)} | time |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(shares)} ---: |")
    for row in rows:
        decibels = [_decibels(row.mean_db), _decibels(row.worst_db)]
        cells = [*decibels, *(f"{row.right[name]:.0f}" for name in shares)]
        print(f"| {row.name} | {' | '.join(cells)} | {_times(row.relative_s)} |")


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value >= EQUAL_DB else f"{value:.1f}"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """A bar for each mode's mean PSNR, a mark for its worst frame, and what is all right."""
    label_px, bar_px, row_px, most_db = 260, 480, 26, 70.0
    approximate = [row for row in rows if row.mean_db is not None]
    image = Image.new("RGB", (label_px + bar_px + 190, row_px * (len(approximate) + 3)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, fill="black")

    def x_of(decibels: float) -> int:
        return label_px + round(bar_px * min(max(decibels, 0.0), most_db) / most_db)

    top, bottom = row_px + 4, row_px * (len(approximate) + 1) + 4
    for decibels in range(0, int(most_db) + 1, 10):
        draw.line((x_of(decibels), top, x_of(decibels), bottom), fill=(225, 225, 225))
        draw.text((x_of(decibels) - 6, bottom + 4), str(decibels), fill="black")
    draw.text(
        (label_px, bottom + 20), "PSNR to fp32, dB: bar the mean, line the worst", fill="black"
    )
    for i, row in enumerate(approximate):
        y = top + i * row_px
        assert row.mean_db is not None
        assert row.worst_db is not None
        draw.text((8, y + 5), row.name, fill="black")
        draw.rectangle((label_px, y + 4, x_of(row.mean_db), y + row_px - 6), fill=(90, 140, 200))
        worst = x_of(row.worst_db)
        draw.line((worst, y + 1, worst, y + row_px - 3), fill=(180, 40, 40), width=3)
        told = f"{row.right['all right']:.0f} % right"
        if row.relative_s is not None:
            told += f", {row.relative_s:.2f} of the time"
        draw.text((label_px + bar_px + 10, y + 5), told, fill="black")
    image.save(path)
    print(f"plot: {path}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares approximate modes with the exact one.")
    command.add_model(parser, DEMO, DEMO_T2V, DEMO_I2V)
    parser.add_argument("--weights", type=Path, help="model directory; default: what ships")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    spec: ModelSpec = given.model
    exact = Settings(
        spec=spec,
        weights=given.weights,
        experts=None,
        device=given.device,
        precision="fp32",
        size=spec.presets[0],
        frames=spec.sampling.num_frames,
        steps=None,
        guidance=None,
        keep_frames=True,
    )
    on_gpu = given.device.startswith("cuda")
    tasks = picked(spec, given.seed, given.clips)
    rows: list[Row] = []
    reference: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "fp8"
        convert_model(locate(spec, given.weights, "auto").open(), store, "fp8")
        for mode in modes(exact, store):
            made = list(do_all(Maker.make, tasks, Maker(mode.settings), given.workers))
            reference = reference or made
            rows.append(compare(mode.name, made, reference, timed=on_gpu))
            print(rows[-1], file=sys.stderr, flush=True)

    machine = torch.cuda.get_device_name(given.device) if on_gpu else platform.machine()
    typed = shlex.join(["python", "-m", "benchmarks.approximations", *sys.argv[1:]])
    title = f"{spec.name}, {len(tasks)} clips, {given.device} ({machine})"
    print(f"{date.today().isoformat()}, {title}, torch {torch.__version__}: `{typed}`\n")
    print_table(rows)
    if given.plot:
        plot(rows, title, given.plot)
    print("\n" + json.dumps({row.name: [row.mean_db, row.worst_db, row.right] for row in rows}))


if __name__ == "__main__":
    main()
