"""How often a demo model shows what its prompt says.

    python -m benchmarks.demo_quality [--model demo-t2v] [--weights DIR] [--device cuda]
        [--workers 4] [--limit N] [--experts low,high]

Prompts that training never used: combinations of colour, shape and motion held out, phrasings
held out, both; a set with two objects; a set that starts from an image. Clips are made one by one
by the engine's own pipeline (`generate_frames`), with the model's default sampling unless told
otherwise; only the loading of weights is done once. `training.analyser` reads the clips. The same
is done to the ground truth and to the autoencoder's copy of it, which bound what the transformer
can reach. A model from text alone is asked for no clips from an image, and one from images for
nothing else: the same prompts with their first frames. --experts says who denoises above and below
the boundary, high,low where nobody does: the others show that each expert does its own part.
Prints Markdown for benchmarks/RESULTS.md, and one line of JSON last.
Left out: taste, sharpness, and what the model does with words that it does not know.

Dims: F frames, H W pixels.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from training import command
from training.analyser import ClipScore, ClipSeen, analyse, expected, score
from training.shapes import (
    MOTIONS,
    SHAPES,
    Split,
    caption,
    render,
    sample_attributes,
    sample_wording,
    sizes_named,
)
from training.sheet import Strip, draw_sheet, to_uint8
from wanfit.engine.decode import to_uint8 as decoded_to_uint8
from wanfit.engine.pipeline import VAE_DTYPE, generate_frames
from wanfit.engine.weights.checkpoint import open_parts
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.locate import locate
from wanfit.events import FramesReady
from wanfit.plan.machine import read_machine
from wanfit.plan.plan import Precision
from wanfit.plan.planner import make_plan
from wanfit.request import VideoRequest, resolve
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, Expert, ModelSpec

Frames = npt.NDArray[np.uint8]  # [F, H, W, 3]
T = TypeVar("T")

ONE_OBJECT_PROMPTS = 300  # a third each: combination, phrasing, both held out
TWO_OBJECT_PROMPTS = 150
IMAGE_PROMPTS = 100
GROUND_TRUTH_CLIPS = 200
SHEET_CLIPS = 24
FAILURES_LISTED = 30


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """One clip to make. Plain values, so that it travels to a worker."""

    group: str  # "combination", "phrasing", "both", "two", "image", "image_two"
    prompt: str
    attributes: tuple[int, ...]  # one row of training.shapes
    sizes_named: tuple[bool, ...]
    seed: int

    @property
    def row(self) -> torch.Tensor:
        return torch.tensor(self.attributes, dtype=torch.int16)


def make_tasks(
    group: str, count: int, seed: int, combinations: Split, phrasings: Split, two: bool = False
) -> list[Task]:
    """`count` prompts of one group, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = sample_attributes(count, generator, combinations, float(two))
    wording = sample_wording(rows, generator, phrasings)
    return [
        Task(
            group=group,
            prompt=caption(row, words),
            attributes=tuple(row.tolist()),
            sizes_named=tuple(named.tolist()),
            seed=seed + i,
        )
        for i, (row, words, named) in enumerate(
            zip(rows, wording, sizes_named(wording), strict=True)
        )
    ]


def all_tasks(spec: ModelSpec, seed: int, limit: int | None) -> list[Task]:
    """Every prompt of the benchmark that the model takes; `limit` cuts each group."""
    third = ONE_OBJECT_PROMPTS // 3
    from_text = [
        make_tasks("combination", third, seed, "held_out", "train"),
        make_tasks("phrasing", third, seed + 1000, "train", "held_out"),
        make_tasks("both", third, seed + 2000, "held_out", "held_out"),
        make_tasks("two", TWO_OBJECT_PROMPTS // 2, seed + 3000, "held_out", "train", two=True),
        make_tasks("two", TWO_OBJECT_PROMPTS // 2, seed + 4000, "held_out", "held_out", two=True),
    ]
    from_image = [
        make_tasks("image", IMAGE_PROMPTS, seed + 5000, "held_out", "train"),
        make_tasks("image_two", IMAGE_PROMPTS // 2, seed + 8000, "held_out", "train", two=True),
    ]
    groups = {"t2v": from_text, "i2v": from_image, "ti2v": [*from_text, *from_image]}[spec.task]
    return list(itertools.chain.from_iterable(group[:limit] for group in groups))


# ---------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """How clips are made. None: the model's default."""

    spec: ModelSpec
    weights: Path | None
    experts: tuple[Expert, ...] | None  # who stands for each of the model's
    device: str
    precision: Precision
    size: tuple[int, int]  # (width, height), px
    frames: int
    steps: int | None
    guidance: float | None
    keep_frames: bool  # for sheets
    guidance_low: float | None = None  # below the boundary
    tile_px: int | None = None  # of the autoencoder; None: as the planner says


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One clip that was made, and what is in it."""

    task: Task
    frames: Frames | None  # where Settings.keep_frames
    seen: ClipSeen
    score: ClipScore
    first_frame_psnr_db: float | None  # against the given image; None without one
    elapsed_s: float

    @property
    def right(self) -> bool:
        return (
            self.score.background
            and self.score.count
            and all(o.right and o.size is not False for o in self.score.objects)
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """One clip that the model did not make: drawn, and copied by the autoencoder."""

    truth: ClipScore
    copy: ClipScore
    psnr_db: float  # of the copy


def open_files(settings: Settings) -> ModelFiles:
    """The model, its experts as `settings` says."""
    spec, experts = settings.spec, settings.experts
    located = locate(spec, settings.weights, "auto")
    if experts is None or located.chosen is None:
        assert experts is None, f"{located.path} is a store, whose experts are what they are"
        return located.open()
    networks = dict(located.chosen.networks)
    for own, other in zip(spec.experts, experts, strict=True):
        networks[own] = located.chosen.networks[other]
    return open_parts(replace(located.chosen, networks=networks))


class Maker:
    """Makes clips in one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.depot = Depot(torch.device(settings.device))
        self.files = open_files(settings)
        self.machine = read_machine()

    def make(self, task: Task) -> Outcome:
        """One clip by the engine's pipeline, read by the analyser."""
        given = self._first_frame(task) if task.group.startswith("image") else None
        began_s = time.perf_counter()
        frames = self._generate(task, given)
        elapsed_s = time.perf_counter() - began_s
        seen = analyse(frames)
        return Outcome(
            task=task,
            frames=frames if self.settings.keep_frames else None,
            seen=seen,
            score=score(seen, expected(task.row), task.sizes_named),
            first_frame_psnr_db=None if given is None else psnr_db(frames[0], given),
            elapsed_s=elapsed_s,
        )

    def _generate(self, task: Task, given: Frames | None) -> Frames:
        settings = self.settings
        image = None if given is None else Image.fromarray(given)
        fields: dict[str, Any] = {
            "prompt": task.prompt,
            "width": settings.size[0],
            "height": settings.size[1],
            "num_frames": settings.frames,
            "seed": task.seed,
            "num_inference_steps": settings.steps,
            "guidance": settings.guidance,
            "guidance_low": settings.guidance_low,
        }
        request = resolve(
            VideoRequest.parse(fields), settings.spec, image_size=image.size if image else None
        )
        plan = make_plan(
            request,
            self.machine,
            with_image=image is not None,
            weights_precision=self.files.precision,
            precision=settings.precision,
            device="cuda" if self.depot.device.type == "cuda" else "cpu",
        )
        if settings.tile_px is not None:
            plan = replace(plan, cuts=replace(plan.cuts, vae_tile_px=settings.tile_px))
        events = generate_frames(plan, self.files, image, self.depot)
        chunks = [event.frames for event in events if isinstance(event, FramesReady)]
        return np.concatenate(chunks)

    def _first_frame(self, task: Task) -> Frames:
        """What the clip should begin with, drawn: uint8 [H, W, 3]."""
        frame: Frames = self.draw(task)[0]
        return frame

    def bound(self, task: Task) -> Bound:
        """What the analyser makes of the ground truth and of the autoencoder's copy of it."""
        drawn = self.draw(task)
        copied = self.copy(drawn)
        asked = expected(task.row)
        return Bound(
            truth=score(analyse(drawn), asked),
            copy=score(analyse(copied), asked),
            psnr_db=psnr_db(copied, drawn),
        )

    def draw(self, task: Task) -> Frames:
        """The ground truth."""
        width, height = self.settings.size
        return to_uint8(render(task.row[None], self.settings.frames, height, width)[0])

    @torch.inference_mode()
    def copy(self, frames: Frames) -> Frames:
        """The autoencoder's copy of a clip."""
        vae = self.files.load_vae(self.depot.device, VAE_DTYPE)
        pixels = (
            torch.from_numpy(frames).to(self.depot.device).permute(3, 0, 1, 2).float() / 127.5 - 1
        )
        latents = vae.encode(pixels[None])
        return np.concatenate([decoded_to_uint8(chunk) for chunk in vae.decode(latents)])


def percent_right(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of clips and of the objects in them, by what is judged: for short tables."""
    objects = [o for outcome in outcomes for o in outcome.score.objects]
    marks = {
        "background": [outcome.score.background for outcome in outcomes],
        "colour": [o.color for o in objects],
        "shape": [o.shape for o in objects],
        "motion": [o.motion for o in objects if o.motion is not None],
        "all right": [outcome.right for outcome in outcomes],
    }
    return {name: 100 * sum(values) / max(1, len(values)) for name, values in marks.items()}


_maker: Maker | None = None  # of a worker process


def _start_worker(settings: Settings) -> None:
    global _maker  # what a worker keeps between its tasks
    torch.set_num_threads(1)
    _maker = Maker(settings)


def _on_worker(job: Callable[[Maker, Task], T], task: Task) -> T:
    assert _maker is not None, "the worker was not started by _start_worker"
    return job(_maker, task)


def do_all(
    job: Callable[[Maker, Task], T], tasks: Sequence[Task], maker: Maker, workers: int
) -> Iterator[T]:
    """The results of a method of `Maker` in the order of the tasks, by that many processes."""
    if workers <= 1:
        yield from (job(maker, task) for task in tasks)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(maker.settings,),
    ) as pool:
        yield from pool.map(functools.partial(_on_worker, job), tasks)


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Peak signal to noise ratio of bytes; 99 where they are equal."""
    error = np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table."""

    key: str  # ends in its unit
    what: str
    value: float
    count: int  # clips or objects that it is measured on
    bar: float | None = None  # the least that will do

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "pass" if self.value >= self.bar else "**fail**"


def percent(
    key: str, what: str, marks: Iterable[bool | None], bar: float | None = None
) -> list[Figure]:
    """The share of True among the marks that are not None; nothing where there are none."""
    counted = [mark for mark in marks if mark is not None]
    if not counted:
        return []
    value = 100 * sum(counted) / len(counted)
    return [Figure(f"{key}_percent", what, value, len(counted), bar)]


def object_marks(scores: Sequence[ClipScore], attribute: str) -> list[bool | None]:
    return [getattr(o, attribute) for clip in scores for o in clip.objects]


BARS = {"shape_color": 97.0, "background": 97.0, "motion": 93.0, "shape": 90.0}


def attribute_figures(
    prefix: str, name: str, scores: Sequence[ClipScore], bars: Mapping[str, float] | None = None
) -> list[Figure]:
    """Colour, background, motion, shape, size, count and exchanged colours of a set of clips."""
    marks: dict[str, tuple[str, list[bool | None]]] = {
        "shape_color": ("shape colour right", object_marks(scores, "color")),
        "background": ("background colour right", [s.background for s in scores]),
        "motion": ("motion right", object_marks(scores, "motion")),
        "shape": ("shape right", object_marks(scores, "shape")),
        "size": ("size right, where named", object_marks(scores, "size")),
        "count": ("as many objects as asked", [s.count for s in scores]),
        "exchanged": ("colours exchanged", [s.exchanged for s in scores]),
    }
    return [
        figure
        for key, (what, values) in marks.items()
        for figure in percent(f"{prefix}_{key}", f"{name}: {what}", values, (bars or {}).get(key))
    ]


def all_figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The figures of what the model made."""

    def of(*groups: str) -> list[ClipScore]:
        return [o.score for o in outcomes if o.task.group in groups]

    figures = attribute_figures("one", "one object", of("combination", "phrasing", "both"), BARS)
    for group in ("combination", "phrasing", "both"):
        name = "combination and phrasing" if group == "both" else group
        for attribute in ("motion", "shape"):
            figures += percent(
                f"{group}_{attribute}",
                f"one object, {name} held out: {attribute} right",
                object_marks(of(group), attribute),
            )
    two = of("two")
    figures += percent(
        "two_both_right",
        "two objects: colour, shape and motion of both right",
        [all(o.right for o in clip.objects) for clip in two],
        80,
    )
    figures += attribute_figures("two", "two objects", two)
    figures += image_figures([o for o in outcomes if o.task.group == "image"])
    figures += attribute_figures("image_two", "two objects, from an image", of("image_two"))
    return figures


def image_figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The figures of the clips that start from an image."""
    if not outcomes:
        return []
    values = [o.first_frame_psnr_db for o in outcomes if o.first_frame_psnr_db is not None]
    scores = [o.score for o in outcomes]
    return [
        *psnr_figures("image_first_frame", "from an image: first frame", values, bar=28),
        *percent(
            "image_first_frame_over_28_db",
            "from an image: first frame over 28 dB",
            [value > 28 for value in values],
        ),
        *percent("image_motion", "from an image: motion right", object_marks(scores, "motion"), 90),
        *percent("image_shape", "from an image: shape right", object_marks(scores, "shape")),
        *percent("image_shape_color", "from an image: colour", object_marks(scores, "color")),
    ]


def psnr_figures(
    key: str, what: str, values: Sequence[float], bar: float | None = None
) -> list[Figure]:
    """Median and least; the bar holds for the median."""
    return [
        Figure(
            f"{key}_psnr_median_db", f"{what}, PSNR, median (dB)", median(values), len(values), bar
        ),
        Figure(f"{key}_psnr_least_db", f"{what}, PSNR, least (dB)", min(values), len(values)),
    ]


def bound_tasks(seed: int, limit: int | None) -> list[Task]:
    """The clips for `bound_figures`, half of them with two objects."""
    half = min(GROUND_TRUTH_CLIPS // 2, limit or GROUND_TRUTH_CLIPS)
    return [
        *make_tasks("truth", half, seed + 6000, "held_out", "train"),
        *make_tasks("truth", half, seed + 7000, "held_out", "train", two=True),
    ]


def bound_figures(measured: Sequence[Bound]) -> list[Figure]:
    """What the transformer can reach at best."""
    return [
        *psnr_figures("vae", "autoencoder alone", [b.psnr_db for b in measured]),
        *attribute_figures("vae", "autoencoder alone", [b.copy for b in measured]),
        *attribute_figures("truth", "ground truth", [b.truth for b in measured]),
    ]


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------


def print_table(figures: Sequence[Figure]) -> None:
    print("| figure | value | bar | | measured on |")
    print("| --- | ---: | ---: | --- | ---: |")
    for f in figures:
        unit = " %" if f.key.endswith("percent") else ""
        bar = "" if f.bar is None else f"{f.bar:g}{unit}"
        print(f"| {f.what} | {f.value:.1f}{unit} | {bar} | {f.verdict} | {f.count} |")


def print_breakdown(outcomes: Sequence[Outcome]) -> None:
    """Right motions by motion and right shapes by shape, all prompts together."""
    print("\n| asked for | motion right | | asked for | shape right |")
    print("| --- | ---: | --- | --- | ---: |")
    pairs = [
        (want, got)
        for o in outcomes
        for want, got in zip(expected(o.task.row).objects, o.score.objects, strict=True)
    ]
    for i in range(max(len(MOTIONS), len(SHAPES))):
        cells = []
        for names, attribute in ((MOTIONS, "motion"), (SHAPES, "shape")):
            if i >= len(names):
                cells += ["", ""]
                continue
            marks = [
                getattr(got, attribute) is not False
                for want, got in pairs
                if getattr(want, attribute) == i
            ]
            cells += [names[i], f"{sum(marks)} of {len(marks)}"]
        print(f"| {cells[0]} | {cells[1]} | | {cells[2]} | {cells[3]} |")


def print_failures(outcomes: Sequence[Outcome]) -> None:
    """What was asked and what was seen."""
    wrong = [o for o in outcomes if not o.right]
    print(f"\n{len(wrong)} of {len(outcomes)} clips have something wrong; the first of them:\n")
    for o in wrong[:FAILURES_LISTED]:
        print(f'- {o.task.group}, seed {o.task.seed}: "{o.task.prompt}" → {o.seen.describe()}')


def draw_sheets(outcomes: Sequence[Outcome], path: Path) -> None:
    """STEM-failures.png and STEM-successes.png beside `path`."""
    for name, right in (("failures", False), ("successes", True)):
        strips = [
            Strip(o.frames, (f"{o.task.prompt} [{o.task.seed}]", f"seen: {o.seen.describe()}"))
            for o in outcomes
            if o.right == right and o.frames is not None
        ][:SHEET_CLIPS]
        if strips:
            file = path.with_name(f"{path.stem}-{name}.png")
            draw_sheet(strips, file)
            print(f"sheet: {file}", file=sys.stderr)


def counted(results: Iterable[T]) -> Iterator[T]:
    """The same, reporting progress on stderr."""
    began_s = time.perf_counter()
    for done, result in enumerate(results, start=1):
        if done % 25 == 0:
            elapsed_s = time.perf_counter() - began_s
            print(f"{done} clips, {elapsed_s:.0f} s", file=sys.stderr, flush=True)
        yield result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Counts how often clips show what was asked for.")
    command.add_model(parser, DEMO, DEMO_T2V, DEMO_I2V)
    parser.add_argument("--weights", type=Path, help="model directory; default: what ships")
    parser.add_argument("--experts", help="for high and low noise, of high and low: low,high")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA")
    parser.add_argument("--workers", type=int, default=1, help="processes that make clips")
    parser.add_argument("--limit", type=int, help="at most this many clips of each group")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT in px")
    parser.add_argument("--frames", type=int, default=DEMO.sampling.num_frames)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sheet", type=Path, help="PNG: writes STEM-failures and STEM-successes")
    return parser.parse_args()


def settings_from(given: argparse.Namespace) -> Settings:
    width, height = (int(side) for side in given.size.split("x"))
    return Settings(
        spec=given.model,
        weights=given.weights,
        experts=read_experts(given.experts),
        device=given.device,
        precision=given.precision or ("bf16" if given.device.startswith("cuda") else "fp32"),
        size=(width, height),
        frames=given.frames,
        steps=given.steps,
        guidance=given.guidance,
        keep_frames=given.sheet is not None,
    )


def read_experts(text: str | None) -> tuple[Expert, ...] | None:
    """ "low,high" as names of experts."""
    if text is None:
        return None
    names: dict[str, Expert] = {"high": "high_noise", "low": "low_noise"}
    return tuple(names[word] for word in text.split(","))


def heading(settings: Settings, workers: int, clip_s: float, total_s: float) -> str:
    """When, on what and how."""
    on_gpu = settings.device.startswith("cuda")
    machine = torch.cuda.get_device_name(settings.device) if on_gpu else platform.machine()
    typed = shlex.join(["python", "-m", "benchmarks.demo_quality", *sys.argv[1:]])
    width, height = settings.size
    return (
        f"{date.today().isoformat()}, {settings.spec.name}, {settings.device} ({machine}),"
        f" torch {torch.__version__},"
        f" {settings.precision}, {width}x{height}, {settings.frames} frames, {workers} workers,"
        f" {clip_s:.2f} s per clip, {total_s:.0f} s in all: `{typed}`\n"
    )


def main() -> None:
    given = parse_arguments()
    settings = settings_from(given)
    began_s = time.perf_counter()
    maker = Maker(settings)
    tasks = all_tasks(settings.spec, given.seed, given.limit)
    outcomes = list(counted(do_all(Maker.make, tasks, maker, given.workers)))
    copied = bound_tasks(given.seed, given.limit)
    measured = list(counted(do_all(Maker.bound, copied, maker, given.workers)))
    figures = [*all_figures(outcomes), *bound_figures(measured)]
    clip_s = median(o.elapsed_s for o in outcomes)
    total_s = time.perf_counter() - began_s

    print(heading(settings, given.workers, clip_s, total_s))
    print_table(figures)
    print_breakdown(outcomes)
    print_failures(outcomes)
    if given.sheet:
        draw_sheets(outcomes, given.sheet)
    summary: dict[str, Any] = {f.key: round(f.value, 2) for f in figures}
    summary |= {"clip_median_s": round(clip_s, 3), "total_s": round(total_s)}
    failed = [f.key for f in figures if f.verdict == "**fail**"]
    print("\n" + json.dumps({**summary, "failed": failed}))


if __name__ == "__main__":
    main()
