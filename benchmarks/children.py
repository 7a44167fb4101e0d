"""Child processes that make clips (benchmarks.clips), and the limits they run under.

Host memory is limited by a cgroup (benchmarks.confine), GPU memory by holding the rest of the card
here while the child runs: what is left is all that the driver gives it, contexts included.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.confine import CannotConfine, Confined, confined, gpu_used_bytes
from benchmarks.figures import note
from wanfit.engine.weights.recognise import STORE_FILE
from wanfit.plan.planner import RAM_RESERVE_SHARE
from wanfit.specs import ModelSpec

Job = dict[str, Any]
Clip = dict[str, Any]

GB = 1_000_000_000
DISK_SAMPLE_BYTES, DISK_PIECE_BYTES, DISK_READERS = 6 * GB, 16 << 20, 4
RAM_SHARE = 1 - RAM_RESERVE_SHARE
PROMPT = "a red circle moves left over blue"


@contextmanager
def only_vram(cap_bytes: int) -> Iterator[None]:
    """Holds all of the card's free memory but `cap_bytes` while the body runs."""
    if gpu_used_bytes() is None:
        yield
        return
    import torch

    free, _ = torch.cuda.mem_get_info()
    surplus = free - cap_bytes
    ballast = torch.empty(max(0, surplus), dtype=torch.uint8, device="cuda")
    left, _ = torch.cuda.mem_get_info()
    note("only_vram", cap_gb=cap_bytes / GB, left_gb=left / GB)
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def ram_option(cap_bytes: int) -> int | None:
    """What a clip under this limit is told of RAM: nothing, where it can see all that there is.

    Some lent machines begin with little RAM and get more as it is used, so that MemTotal says less
    than there will be. There the limit is told, less what the planner leaves to others.
    """
    return None if meminfo()["MemTotal"] >= cap_bytes else int(cap_bytes * RAM_SHARE)


def disk_bytes_per_s(file: Path) -> float:
    """The rate of direct reads by a few threads, from a file's middle: what the disk itself gives.

    Around the page cache, so what is cached does not help.
    """
    whole = file.stat().st_size // DISK_PIECE_BYTES
    count = min(whole, DISK_SAMPLE_BYTES // DISK_PIECE_BYTES)
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read(reader: int) -> int:
        buffer = mmap.mmap(-1, DISK_PIECE_BYTES)  # aligned to a page, as O_DIRECT wants it
        return sum(
            os.preadv(descriptor, [buffer], piece * DISK_PIECE_BYTES)
            for piece in range(reader, count, DISK_READERS)
        )

    try:
        began_s = time.perf_counter()
        with ThreadPoolExecutor(DISK_READERS) as pool:
            num_bytes = sum(pool.map(read, range(DISK_READERS)))
        return num_bytes / (time.perf_counter() - began_s)
    finally:
        os.close(descriptor)


def job_for(
    name: str, store: Path, spec: ModelSpec, size: tuple[int, int], num_frames: int, scratch: Path
) -> Job:
    precision = json.loads((store / STORE_FILE).read_text())["precision"]
    return {
        "name": name,
        "options": {
            "prompt": PROMPT, "model": spec.name, "weights": str(store), "precision": precision,
            "width": size[0], "height": size[1], "num_frames": num_frames, "seed": 1,
            "output": str(scratch / "clip.npy"), "with_image": spec.needs_image,
        },
    }  # fmt: skip


def command_for(jobs: Sequence[Job], scratch: Path) -> list[str]:
    """The command that makes these clips, one JSON line each."""
    descriptor, name = tempfile.mkstemp(suffix=".json", dir=scratch)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(jobs, file)
    return [sys.executable, "-m", "benchmarks.clips", name]


def confined_clips(
    jobs: Sequence[Job], ram_bytes: int, scratch: Path, *, drop_caches: bool
) -> tuple[Confined, list[Clip]]:
    """The clips, made within a memory cgroup; measured without a limit where none can be set."""
    command = command_for(jobs, scratch)
    try:
        found = confined(command, memory_max=ram_bytes, drop_caches=drop_caches)
    except CannotConfine as error:
        note("confine", problem=str(error), limit="none was set")
        found = confined(command, memory_max=None)
    return found, [clip for line in found.stdout.splitlines() if (clip := parsed(line))]


def first_clip(jobs: Sequence[Job], scratch: Path) -> Clip | None:
    ran = subprocess.run(command_for(jobs, scratch), stdout=subprocess.PIPE, text=True, check=False)
    return next(filter(None, map(parsed, ran.stdout.splitlines())), None)


def parsed(line: str) -> Clip | None:
    if not line.startswith('{"clip"'):
        return None
    clip: Clip = json.loads(line)
    return clip


def step_seconds(clip: Clip) -> list[float]:
    """From one step's end to the next one's; the first from the stage's begin."""
    times = [clip["stage_began_s"]["denoise"], *clip["steps_s"]]
    return [after - before for before, after in pairwise(times)]


def warm(store: Path) -> None:
    """Reads every file of a store into the page cache, several at a time."""
    files = sorted(store.glob("*.safetensors"))
    began_s = time.perf_counter()

    def read(file: Path) -> int:
        with file.open("rb", buffering=0) as stream:
            buffer = bytearray(64 << 20)
            return sum(iter(lambda: stream.readinto(buffer) or 0, 0))

    with ThreadPoolExecutor(len(files)) as pool:
        num_bytes = sum(pool.map(read, files))
    note("warm", gb=num_bytes / GB, elapsed_s=time.perf_counter() - began_s)


def used_ram_bytes() -> int:
    """All memory of the machine that is not free, page cache included."""
    sizes = meminfo()
    return sizes["MemTotal"] - sizes["MemFree"]


def meminfo() -> dict[str, int]:
    """Name -> bytes of /proc/meminfo."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
