"""Many jobs in a row through the real worker of RunPod's SDK, with memory looked at after each.

    python -m benchmarks.serve.runpod_jobs [--jobs 200]

A queue on the loopback (`wanfit.testing.runpod_queue`), the worker as a process, the demo model at
64x64. Prints how many were answered, seconds per job, and the resident memory of the worker and of
its GPU process after the first tenth and at the end; exits with 1 where a job is missing or memory
grew by more than GROWTH.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.runpod.workers import TINY, WorkerProcess
from wanfit.testing.runpod_queue import RunpodQueue

GROWTH = 1.05  # ours: of what was held after the first tenth; allocators breathe by a few percent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder, RunpodQueue() as queue:
        worker = WorkerProcess(queue, Path(folder) / "data")
        try:
            return _run(queue, worker, count)
        finally:
            worker.kill()


def _run(queue: RunpodQueue, worker: WorkerProcess, count: int) -> int:
    took_s: list[float] = []
    held: list[tuple[int, int]] = []
    for _ in range(count):
        began_s = time.monotonic()
        body = worker.make(TINY)
        took_s.append(time.monotonic() - began_s)
        assert body["output"]["status"] == "completed", body
        held.append((_rss_bytes(worker.process.pid), _rss_bytes(_gpu_pid(worker))))
    late = sum(post.kind == "progress" for post in _after_results(queue))
    tenth = held[max(0, count // 10 - 1)]
    print(f"{count} jobs answered, {late} updates after a result")
    print(f"median {statistics.median(took_s):.2f} s a job, one of it the SDK's own pause")
    flat = True
    for name, early, end in zip(("worker", "GPU process"), tenth, held[-1], strict=True):
        print(f"{name}: {early / 2**20:.0f} MiB after {count // 10} jobs, {end / 2**20:.0f} MiB")
        flat = flat and end <= early * GROWTH
    return 0 if flat and not late else 1


def _after_results(queue: RunpodQueue) -> list:  # type: ignore[type-arg]
    done: set[str] = set()
    late = []
    for post in queue.posts:
        if post.job_id in done:
            late.append(post)
        if post.kind == "result":
            done.add(post.job_id)
    return late


def _gpu_pid(worker: WorkerProcess) -> int:
    """The child that runs wanfit.jobs.gpu; the other one is the SDK's, for pings."""
    children = Path(f"/proc/{worker.process.pid}/task").glob("*/children")
    for child in {int(pid) for file in children for pid in file.read_text().split()}:
        if b"wanfit.jobs.gpu" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise AssertionError("there is no GPU process")


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
