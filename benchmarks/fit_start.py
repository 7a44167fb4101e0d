"""How soon denoising begins, what a second process costs, and which allocator reserves least."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.children import (
    GB,
    Job,
    command_for,
    first_clip,
    job_for,
    parsed,
    ram_option,
    used_ram_bytes,
    warm,
)
from benchmarks.confine import confined
from benchmarks.figures import GIB, Figure, note, say
from benchmarks.stores import Stores
from wanfit.specs import T2V_A14B, TI2V_5B


def start(stores: Stores) -> None:
    """How soon denoising begins with a warm page cache, and what a second process costs."""
    store = stores.get(T2V_A14B, "bf16", "experts")
    warm(store)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        job = job_for("start", store, T2V_A14B, (832, 480), 81, scratch)
        job["options"] |= {"num_inference_steps": 1, "ram": ram_option(80 * GB)}
        started = [first_clip([job], scratch) for _ in range(3)]
        for run, clip in enumerate(started):
            note("start", run=run, report=clip["report"] if clip else None)
        times = [clip["report"]["started"] for clip in started if clip and clip["ok"]]
        begins = [max(filter(None, (t["denoising_s"], t["first_block_ready_s"]))) for t in times]
        value = median(begins) if begins else None
        detail = {"runs": times}
        say(Figure("start", "first step begins", value, "s", at_most=8, detail=detail))
        _second_process(job, scratch)


def _second_process(job: Job, scratch: Path) -> None:
    """A process holds the model in the middle of a clip; what does a second one add?"""
    first_job = job | {"name": "first", "hold_after_steps": 1}
    first_job["options"] = job["options"] | {"vram": 20 * GB, "ram": 80 * GB}
    second_job = job | {"options": first_job["options"] | {"output": str(scratch / "second.npy")}}
    holder = subprocess.Popen(
        command_for([first_job], scratch), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        held = json.loads(holder.stdout.readline())
        before = used_ram_bytes()
        most = before
        second = subprocess.Popen(command_for([second_job], scratch), stdout=subprocess.PIPE)
        while second.poll() is None:
            most = max(most, used_ram_bytes())
            time.sleep(0.05)
        line = second.communicate()[0].decode()
        clip = parsed(line.splitlines()[-1]) if line else None
        note("second process", first=held, second=clip and clip["memory"])
        growth = (most - before) / GB if clip and clip["ok"] else None
        say(Figure("second process", "host memory grows by", growth, "GB", at_most=2))
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.wait(timeout=120)
    finally:
        holder.kill()
        holder.wait()


ALLOCATORS = ("expandable_segments:False", "expandable_segments:True", "backend:cudaMallocAsync")


def allocator(stores: Stores) -> None:
    """Reserved bytes of the same clips under each allocator of torch."""
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        jobs = []
        for spec, size, frames in ((T2V_A14B, (832, 480), 81), (TI2V_5B, (1280, 704), 49)):
            store = stores.get(spec, "bf16", "hollow")
            job = job_for(spec.name, store, spec, size, frames, scratch)
            job["options"] |= {"num_inference_steps": 1, "vram": 16 * GB, "ram": 90 * GB}
            jobs.append(job)
        for setting in ALLOCATORS:
            found = confined(
                command_for(jobs, scratch), memory_max=None, env={"PYTORCH_ALLOC_CONF": setting}
            )
            for clip in filter(None, map(parsed, found.stdout.splitlines())):
                if not clip["ok"]:
                    note("allocator", setting=setting, clip=clip["clip"], error=clip["message"])
                    continue
                for stage in clip["report"]["stages"]:
                    detail = {"allocated_gib": stage["device_allocated_bytes"] / GIB}
                    what = f"{clip['clip']} {stage['stage']}, {setting}"
                    reserved = stage["device_reserved_bytes"] / GIB
                    say(Figure("allocator", what, reserved, "GiB", detail=detail))
