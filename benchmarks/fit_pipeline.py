"""Whole clips under hard limits of GPU and host memory: do they complete, and how fast?

Left out: the single forward (benchmarks.fit_forward).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.children import (
    GB,
    Clip,
    confined_clips,
    disk_bytes_per_s,
    job_for,
    only_vram,
    ram_option,
    step_seconds,
)
from benchmarks.confine import Confined
from benchmarks.figures import Figure, note, say
from benchmarks.stores import Fidelity, Stores
from benchmarks.true_size import holes_of
from wanfit.plan.plan import Precision
from wanfit.specs import T2V_A14B, TI2V_5B, ModelSpec

VRAM_CAP_BYTES, RAM_CAP_BYTES = 31_370_000_000, 117 * GB  # the issue's: an RTX 5090 on RunPod


@dataclass(frozen=True, slots=True)
class PipelineCase:
    """One clip under limits, with the bars that it has beside being completed."""

    name: str
    spec: ModelSpec
    precision: Precision
    size: tuple[int, int]
    num_frames: int
    steps: int
    vram_bytes: int
    ram_bytes: int
    fidelity: Fidelity = "whole"
    most_host_gb: float | None = None
    cold: bool = False  # the page cache is dropped first, so that the group pays for every page
    from_disk: bool = False  # the step time is compared with what compute and disk allow


PIPELINES = (
    PipelineCase(
        "fp8 720p, 31.37 GB VRAM, 117 GB RAM", T2V_A14B, "fp8", (1280, 720), 81, 4,
        VRAM_CAP_BYTES, RAM_CAP_BYTES, most_host_gb=40, cold=True,
    ),
    PipelineCase(
        "fp8 720p, 31.37 GB VRAM, 16 GB RAM", T2V_A14B, "fp8", (1280, 720), 81, 4,
        VRAM_CAP_BYTES, 16 * GB, from_disk=True, cold=True,
    ),
    PipelineCase(
        "bf16 720p, 31.37 GB VRAM, 117 GB RAM", T2V_A14B, "bf16", (1280, 720), 81, 4,
        VRAM_CAP_BYTES, RAM_CAP_BYTES, most_host_gb=70, cold=True,
    ),
    PipelineCase(
        "bf16 720p, 8 GB VRAM", T2V_A14B, "bf16", (1280, 720), 81, 4,
        8 * GB, RAM_CAP_BYTES,
    ),
    *(
        PipelineCase(
            f"5B {frames} frames, {cap / GB:g} GB VRAM", TI2V_5B, "bf16", (1280, 704), frames, 4,
            cap, RAM_CAP_BYTES,
        )
        for frames in (25, 121) for cap in (24 * GB, VRAM_CAP_BYTES)
    ),
)  # fmt: skip


def pipeline(stores: Stores, word: str) -> None:
    """Every case of PIPELINES whose name has `word` in it."""
    compute_step_s: dict[Precision, float] = {}
    for case in PIPELINES:
        if word not in case.name:
            continue
        store = stores.get(case.spec, case.precision, case.fidelity)
        with tempfile.TemporaryDirectory() as scratch:
            job = job_for(case.name, store, case.spec, case.size, case.num_frames, Path(scratch))
            job["options"] |= {"num_inference_steps": case.steps, "ram": ram_option(case.ram_bytes)}
            with only_vram(case.vram_bytes):
                found, clips = confined_clips(
                    [job], case.ram_bytes, Path(scratch), drop_caches=case.cold
                )
        clip = clips[0] if clips else None
        if not _say_pipeline(case, found, clip, store) or clip is None:
            continue
        if case.from_disk:
            _say_disk(case, clip, compute_step_s.get(case.precision), store)
        else:
            # The least: the first steps of each expert may have read the disk.
            compute_step_s.setdefault(case.precision, min(step_seconds(clip)))


def _say_pipeline(case: PipelineCase, found: Confined, clip: Clip | None, store: Path) -> bool:
    """The figures of one case, and whether it ended well within real limits."""
    name = f"pipeline, {case.name}"
    limited = found.memory_max is not None
    completed = clip is not None and clip["ok"] and found.returncode == 0 and limited
    detail = {
        "returncode": found.returncode, "oom_kills": found.oom_kills, "elapsed_s": found.elapsed_s,
        "error": clip and clip.get("message"), "memory_max": found.memory_max,
        "stat_peaks": found.stat_peaks, "refaults": found.refaults,
        "resident_gb": found.resident_peak / GB,
        "resident_anon_gb": found.resident_anon_peak / GB,
        "holes": holes_of(store), "cold": case.cold,
    }  # fmt: skip
    say(Figure(name, "completes", completed, must=True, detail=detail))
    held = found.held_peak / GB if limited else None
    say(Figure(name, "host memory held", held, "GB", at_most=case.most_host_gb))
    cached = found.memory_peak / GB if limited else None
    say(Figure(name, "host memory with page cache", cached, "GB"))
    if found.gpu_peak is not None:
        cap = case.vram_bytes / GB
        say(Figure(name, "GPU memory of the process", found.gpu_peak / GB, "GB", at_most=cap))
    if clip is None or not clip["ok"]:
        return False
    note(name, report=clip["report"], steps_s=clip["steps_s"], stage_began_s=clip["stage_began_s"])
    steps_s = step_seconds(clip)
    say(Figure(name, "step", median(steps_s), "s", detail={"steps_s": steps_s}))
    for moved in clip["moved"]:
        if moved["stage"] == "denoise":
            waited_ms = 1000 * moved["waited_s"] / moved["forwards"]
            say(Figure(name, "waited per forward", waited_ms, "ms", detail=moved))
    return bool(completed)


def _say_disk(case: PipelineCase, clip: Clip, compute_step_s: float | None, store: Path) -> None:
    """The step beside what the slower of compute and disk allows."""
    name = f"pipeline, {case.name}"
    step_s = median(step_seconds(clip))
    rate = disk_bytes_per_s(store / "high_noise.safetensors")
    moved = next(moved for moved in clip["moved"] if moved["stage"] == "denoise")
    # Registered blocks stay in RAM. They belong to both experts alike; one of them runs a step.
    registered = moved["registered_bytes"] / len(case.spec.experts)
    per_step = (moved["streamed_bytes"] / moved["forwards"] - registered) * (
        moved["forwards"] / case.steps
    )
    disk_s = per_step / rate
    detail = {
        "disk_gb_per_s": rate / GB, "gb_from_disk_per_step": per_step / GB, "disk_s": disk_s,
        "compute_s": compute_step_s, "step_s": step_s,
    }  # fmt: skip
    say(Figure(name, "disk, direct reads", rate / GB, "GB/s"))
    slower = max(disk_s, compute_step_s or 0.0)
    ratio = None if compute_step_s is None else step_s / slower
    what = "step against the slower of compute and disk"
    say(Figure(name, what, ratio, "x", at_most=1.1, floor=1.0, detail=detail))
