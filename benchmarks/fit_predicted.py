"""What the plan says against what is measured, over random clips; and a hundred jobs in a row."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import GB, PROMPT, Clip, Job, command_for, job_for, parsed
from benchmarks.confine import confined
from benchmarks.figures import GIB, Figure, note, say
from benchmarks.stores import Stores
from wanfit.errors import DoesNotFit
from wanfit.geometry import geometry_of
from wanfit.plan.machine import Machine, read_machine
from wanfit.plan.plan import Precision
from wanfit.plan.planner import make_plan
from wanfit.request import VideoRequest, resolve
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec

NUM_CASES, NUM_JOBS, ANCHOR_EVERY = 75, 100, 10
SAME_MODEL = 4  # jobs in a row with one model: each change reads tens of GB anew
NUM_STEPS = 2
MOST_TOKENS = 34_000  # of a random case: 832x480x81 has 32,760
MOST_TOKENS_OF_A_JOB = 4_000  # jobs are to be many, not long
LEAST_TOKENS = 300
SEED = 4
MODELS = (TI2V_5B, T2V_A14B, I2V_A14B)
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
ANCHOR: tuple[ModelSpec, Precision] = (T2V_A14B, "fp8")
ANCHOR_SHAPE = ((640, 368), 17)  # (width, height), frames


@dataclass(frozen=True, slots=True)
class _Draw:
    """What random clips are drawn from; budgets in bytes, spread evenly over their logarithm."""

    count: int
    most_tokens: int
    least_vram: int
    most_vram: int
    least_ram: int
    most_ram: int


# RAM up to 32 GB: what is registered is given back when the next job has another model.
PREDICTED = _Draw(NUM_CASES, MOST_TOKENS, 3 * GB, 36 * GB, 8 * GB, 32 * GB)
JOBS = _Draw(NUM_JOBS, MOST_TOKENS_OF_A_JOB, 3 * GB, 12 * GB, 6 * GB, 12 * GB)


def predicted(stores: Stores, limit_s: float) -> None:
    """Clips of two steps in one process, each planned within random budgets: plan against meter."""
    _say_predicted(_run(stores, PREDICTED, limit_s))


def jobs_in_a_row(stores: Stores, limit_s: float) -> None:
    """A hundred short clips in one process: does memory grow?"""
    _say_jobs(_run(stores, JOBS, limit_s))


def _run(stores: Stores, draw: _Draw, limit_s: float) -> list[Clip]:
    """The clips that were made within the time.

    Two steps, so that both experts of a model have one. Weights are holes: zeros take the same
    bytes everywhere. Every tenth clip is the same one.
    """
    until_s = time.perf_counter() + limit_s
    machine = read_machine()
    found: list[Clip] = []
    with tempfile.TemporaryDirectory() as scratch:
        jobs, refused = random_jobs(stores, draw, machine, Path(scratch))
        note("predicted", jobs=len(jobs), refused=refused)

        def take(line: str) -> None:
            clip = parsed(line)
            if clip is not None:
                found.append(clip)
                held = {name: clip["memory"][name] for name in ("RssAnon", "RssFile", "RssShmem")}
                times = {"began_s": clip["began_s"], "ended_s": clip["ended_s"]}
                note("predicted", clip=clip["clip"], ok=clip["ok"], **times, **held, **_peaks(clip))

        result = confined(
            command_for(jobs, Path(scratch)), memory_max=None, on_line=take,
            timeout_s=max(1.0, until_s - time.perf_counter()),
        )  # fmt: skip
        note("predicted", returncode=result.returncode, elapsed_s=result.elapsed_s)
    return found


def random_jobs(
    stores: Stores, draw: _Draw, machine: Machine, scratch: Path
) -> tuple[list[Job], int]:
    """Jobs that the planner accepts, and how many it refused on the way."""
    dice = random.Random(SEED)
    kinds: list[tuple[ModelSpec, Precision]] = [
        (spec, precision) for spec in MODELS for precision in PRECISIONS
    ]
    paths: dict[tuple[str, Precision], Path] = {}
    for _ in range(2):  # making one may have removed another, to have room
        paths = {(s.name, p): stores.get(s, p, "hollow") for s, p in kinds}
    jobs: list[Job] = []
    refused = 0
    kind = ANCHOR
    while len(jobs) < draw.count:
        is_anchor = len(jobs) % ANCHOR_EVERY == 0
        if len(jobs) % SAME_MODEL == 0:
            kind = dice.choice(kinds)
        spec, precision = ANCHOR if is_anchor else kind
        size, frames = ANCHOR_SHAPE if is_anchor else _random_shape(dice, spec, draw.most_tokens)
        name = f"{'anchor' if is_anchor else 'random'} {len(jobs)}"
        job = job_for(name, paths[spec.name, precision], spec, size, frames, scratch)
        budgets = {
            "vram": _amount(dice, draw.least_vram, draw.most_vram),
            "ram": _amount(dice, draw.least_ram, draw.most_ram),
        }
        job["options"] |= {"num_inference_steps": NUM_STEPS, **budgets}
        if is_anchor:
            job["options"] |= {"vram": draw.most_vram // 3, "ram": draw.most_ram * 3 // 4}
        if _plans(job["options"], spec, precision, machine):
            jobs.append(job)
        else:
            assert not is_anchor, "the anchor fits every machine that this is run on"
            refused += 1
    return jobs, refused


def _amount(dice: random.Random, least: int, most: int) -> int:
    return int(least * math.pow(most / least, dice.random()))


def _random_shape(
    draw: random.Random, spec: ModelSpec, most_tokens: int
) -> tuple[tuple[int, int], int]:
    """A legal (width, height) and number of frames; tokens spread evenly over their logarithm."""
    tokens = LEAST_TOKENS * (most_tokens / LEAST_TOKENS) ** draw.random()
    while True:
        grid = spec.grid_px
        width = grid * draw.randint(128 // grid, 1280 // grid)
        height = grid * draw.randint(128 // grid, 1280 // grid)
        frames = 1 + 4 * draw.randint(0, 30)
        got = geometry_of(spec, width, height, frames).num_tokens
        if 0.8 * tokens < got < 1.25 * tokens and 0.4 < width / height < 2.5:
            return (width, height), frames


def _plans(
    options: Mapping[str, Any], spec: ModelSpec, precision: Precision, machine: Machine
) -> bool:
    request = VideoRequest(
        prompt=PROMPT, model=spec.name, width=options["width"], height=options["height"],
        num_frames=options["num_frames"], num_inference_steps=NUM_STEPS,
    )  # fmt: skip
    with_image = bool(options.get("with_image"))
    try:
        make_plan(
            resolve(request, spec, image_size=(640, 352) if with_image else None), machine,
            with_image=with_image, weights_precision=precision, precision=precision,
            vram_budget_bytes=options["vram"], ram_budget_bytes=options["ram"], device="auto",
        )  # fmt: skip
    except DoesNotFit:
        return False
    return True


def _peaks(clip: Clip) -> dict[str, Any]:
    """Predicted and measured peaks of a clip, and the relative errors of the prediction."""
    if not clip["ok"] or not clip["report"]:
        return {"error": clip.get("error"), "message": clip.get("message")}
    report = clip["report"]
    planned = {stage["stage"]: stage for stage in report["plan"]["stages"]}
    by_stage: dict[str, dict[str, float]] = {}
    # What the process has on the card beside torch's allocator: CUDA's context and libraries.
    context = clip["gpu"]["used"] - clip["gpu"]["reserved"] if clip["gpu"] else 0
    for used in report["stages"]:
        plan = planned[used["stage"]]
        by_stage[used["stage"]] = {
            "gpu_planned": sum(plan["device_bytes"].values()),
            "gpu": (used["device_reserved_bytes"] or 0) + context,
            "allocated": used["device_allocated_bytes"] or 0,
            # Clips are written as .npy: nothing is encoded.
            "host_planned": sum(plan["host_bytes"].values())
            - plan["host_bytes"].get("video encoder", 0),
            "host": used["host_resident_bytes"],
        }
    _count_registered(by_stage, report)
    peak = {key: max(stage[key] for stage in by_stage.values()) for key in _PEAK_KEYS}
    settings = report["settings"]
    return {
        "case": [settings[key] for key in ("model", "width", "height", "num_frames")],
        "precision": report["precision"],
        "gpu_error": _error(peak["gpu_planned"], peak["gpu"]),
        "host_error": _error(peak["host_planned"], peak["host"]),
        "context": context,
        "by_stage": by_stage,
        **peak,
    }


def _count_registered(by_stage: dict[str, dict[str, float]], report: Mapping[str, Any]) -> None:
    """Registered pages count even where the kernel took them from the process's page table.

    Short of free memory the kernel unmaps pages of files. CUDA has pinned these, so they stay in
    RAM, but no longer count as resident: seen when the page cache had filled the machine.
    """
    moved = {moved["stage"]: moved for moved in report["weights_moved"]}
    held = by_stage["text"]["host"] + moved["denoise"]["registered_bytes"]
    for stage in ("denoise", "decode"):
        by_stage[stage]["resident"] = by_stage[stage]["host"]
    by_stage["denoise"]["host"] = max(by_stage["denoise"]["host"], held)


_PEAK_KEYS = ("gpu_planned", "gpu", "host_planned", "host")


def _error(planned: float, measured: float) -> float:
    """Above 0: planned too much. Below 0: too little."""
    return (planned - measured) / measured if measured else 0.0


def _say_predicted(clips: Sequence[Clip]) -> None:
    section = "predicted against measured"
    peaks = [_peaks(clip) for clip in clips if clip["ok"]]
    say(Figure(section, "cases", float(len(peaks)), at_least=60))
    failed = [clip for clip in clips if not clip["ok"]]
    detail = {"failed": [(clip["clip"], clip.get("message")) for clip in failed]}
    say(Figure(section, "cases that failed", float(len(failed)), at_most=0, detail=detail))
    retried = sum(bool(clip["ok"] and clip["report"]["retried"]) for clip in clips)
    say(Figure(section, "cases that needed a second, tighter plan", float(retried), at_most=0))
    if peaks:
        context = median(peak["context"] for peak in peaks) / GIB
        say(Figure(section, "CUDA context and libraries", context, "GiB"))
        for memory in ("gpu", "host"):
            _say_errors(section, memory, peaks)


def _say_errors(section: str, memory: str, peaks: Sequence[Mapping[str, Any]]) -> None:
    errors = [peak[f"{memory}_error"] for peak in peaks]
    over, under = max([0.0, *errors]), max([0.0, *(-error for error in errors)])
    worst = max(peaks, key=lambda peak: abs(peak[f"{memory}_error"]), default={})
    say(Figure(section, f"{memory}, most over", 100 * over, "%", at_most=5, detail=dict(worst)))
    say(Figure(section, f"{memory}, most under", 100 * under, "%", at_most=1))
    if errors:
        middle = 100 * median(abs(error) for error in errors)
        say(Figure(section, f"{memory}, median error", middle, "%"))


def _say_jobs(clips: Sequence[Clip]) -> None:
    """Whether memory grows from one anchor to the next; the first warms caches up."""
    section = "jobs in a row"
    say(Figure(section, "jobs", float(len(clips)), at_least=NUM_JOBS))
    failed = [(clip["clip"], clip.get("message")) for clip in clips if not clip["ok"]]
    say(Figure(section, "failed", float(len(failed)), at_most=0, detail={"failed": failed}))
    _say_errors(section, "host", [_peaks(clip) for clip in clips if clip["ok"]])
    anchors = [clip for clip in clips if clip["clip"].startswith("anchor")][1:]
    if len(anchors) >= 2:
        resident = [clip["memory"]["VmRSS"] for clip in anchors]
        growth = 100 * (resident[-1] / resident[0] - 1)
        detail = {"resident_gb": [size / GB for size in resident]}
        say(Figure(section, "host memory, growth", growth, "%", at_most=2, detail=detail))
    if clips and clips[-1]["gpu"]:
        left = clips[-1]["gpu"]
        say(Figure(section, "GPU memory after the last", left["reserved"] / GIB, "GiB", at_most=0))
