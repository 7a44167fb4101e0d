"""Does it fit, and is streaming free? The figures of issue "Fit", on one GPU with true sizes.

    python -m benchmarks.fit SECTION ... [--limit SECTION=SECONDS] [--stores DIR] [--out FILE]

Sections:
    forward     one transformer forward: resident, registered, ring; at the sizes of FORWARDS
    pipeline    whole clips under caps of GPU and host memory; `pipeline:fp8` runs those with "fp8"
    predicted   75 clips of random sizes and budgets in one process: plan against meter
    jobs        100 short clips of random models, sizes and budgets in one process: does it grow?
    start       from process start to the first step; a second process beside the first
    allocator   reserved bytes under each allocator of torch
    peers       diffusers with its own offloading

`forward:480p` runs the cases whose name has "480p" in it, `forward:A14B 480p81` that case alone;
likewise with `pipeline` and `peers`, by a part of the name.
Each section is a process of its own with a limit of time, and prints every figure as a JSON line as
soon as it is known. The table comes last. Weights are random and of true size
(benchmarks.true_size); where the disk cannot hold all of them, notes say what was a hole.

On a lent machine with one H100, where a command has ten minutes, from the repository's root:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl .whl2/*.whl
    export PYTHONPATH=/tmp/site:src PYTHONUNBUFFERED=1
    python3 -m benchmarks.fit forward --out $OUT/forward.jsonl
    python3 -m benchmarks.fit pipeline:fp8 --out $OUT/fp8.jsonl
    python3 -m benchmarks.fit pipeline:bf16 --out $OUT/bf16.jsonl
    python3 -m benchmarks.fit pipeline:5B start peers --out $OUT/more.jsonl
    python3 -m benchmarks.fit predicted allocator --out $OUT/predicted.jsonl

`.whl2` has diffusers, which only `peers` needs. `python -m benchmarks.figures FILE... --into
benchmarks/RESULTS.md` makes such files into a section of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, figure_line, machine_line, read_figures, table
from wanfit.service import ALLOCATOR, ALLOCATOR_VARIABLE
from wanfit.specs import T2V_A14B

if TYPE_CHECKING:
    from benchmarks.stores import Stores

# Seconds, on one H100; a command on a lent machine has 600.
LIMITS_S = {
    "forward": 420.0, "pipeline": 560.0, "predicted": 570.0, "jobs": 400.0, "start": 150.0,
    "allocator": 150.0, "peers": 240.0,
}  # fmt: skip
PEER_VRAM_BYTES = 31_370_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.fit", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("sections", nargs="+", metavar="SECTION", help=", ".join(LIMITS_S))
    parser.add_argument("--stores", type=Path, default=Path("/tmp/wanfit-stores"), metavar="DIR")
    parser.add_argument("--limit", action="append", default=[], metavar="SECTION=S")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    parser.add_argument("--compile", action="store_true", help="forward with compiled kernels")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for section in options.sections:
        if section.partition(":")[0] not in LIMITS_S:
            parser.error(f"no section {section!r}; there are {', '.join(LIMITS_S)}")
    limits = dict(limit.split("=", 1) for limit in options.limit)
    if options.inside:
        (section,) = options.sections
        name = section.partition(":")[0]
        limit_s = float(limits.get(name, LIMITS_S[name]))
        _run_inside(section, options.stores, limit_s, compiled=options.compile)
        return 0
    return _run_all(options, limits)


def _run_all(options: argparse.Namespace, limits: dict[str, str]) -> int:
    """Each section in a child; lines are passed on as they come; the table last."""
    command = shlex.join(["python", "-m", "benchmarks.fit", *sys.argv[1:]])
    out = options.out.open("a", encoding="utf-8") if options.out else None
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if out:
            out.write(line + "\n")
            out.flush()

    take(json.dumps({"run": machine_line(), "command": command}))
    for section in options.sections:
        name = section.partition(":")[0]
        limit_s = float(limits.get(section, limits.get(name, LIMITS_S[name])))
        child = [
            sys.executable, "-m", "benchmarks.fit", "--inside", section,
            "--stores", str(options.stores), "--limit", f"{name}={limit_s}",
            *(["--compile"] if options.compile else []),
        ]  # fmt: skip
        began_s = time.perf_counter()
        ended = _run_child(child, limit_s, take)
        elapsed_s = time.perf_counter() - began_s
        take(json.dumps({"note": section, "ended": ended, "elapsed_s": round(elapsed_s, 1)}))
    figures = read_figures(lines)
    compared = list(_against_peers(figures))
    for figure in compared:
        take(figure_line(figure))
    print(table([*figures, *compared]), flush=True)
    if out:
        out.close()
    return 0


def _run_child(command: Sequence[str], limit_s: float, take: Callable[[str], None]) -> str:
    """Passes its lines on; kills it, with what it started, at the limit. How it ended."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, errors="replace"
    )
    assert child.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(child.pid, 9)

    timer = threading.Timer(limit_s, stop)
    timer.start()
    try:
        for line in child.stdout:
            take(line.rstrip("\n"))
        returncode = child.wait()
    finally:
        timer.cancel()
        child.stdout.close()
    return f"stopped at its limit of {limit_s:g} s" if late.is_set() else f"returned {returncode}"


def _run_inside(section: str, stores_path: Path, limit_s: float, *, compiled: bool) -> None:
    """One section, in this process."""
    from benchmarks.stores import Stores

    stores = Stores(stores_path)
    name, _, word = section.partition(":")
    match name:
        case "forward":
            _forward(stores, word, compiled=compiled)
        case "pipeline":
            from benchmarks.fit_pipeline import pipeline

            pipeline(stores, word)
        case "predicted":
            from benchmarks.fit_predicted import predicted

            predicted(stores, limit_s - 20)  # time to say what was found
        case "jobs":
            from benchmarks.fit_predicted import jobs_in_a_row

            jobs_in_a_row(stores, limit_s - 20)
        case "start":
            from benchmarks.fit_start import start

            start(stores)
        case "allocator":
            from benchmarks.fit_start import allocator

            allocator(stores)
        case "peers":
            _peers(stores, word)


def _forward(stores: Stores, word: str, *, compiled: bool) -> None:
    os.environ.setdefault(ALLOCATOR_VARIABLE, ALLOCATOR)  # as a clip has it, before torch begins
    import torch

    from benchmarks.fit_forward import FORWARDS, run_case

    device = torch.device("cuda")
    exact = [case for case in FORWARDS if case.name == word]
    for case in exact or [case for case in FORWARDS if word in case.name]:
        store = stores.get(case.spec, case.precision, "first")
        run_case(case, store, device, compiled=compiled)


def _peers(stores: Stores, word: str) -> None:
    from benchmarks.offload_peers import PEERS, run_peers

    cases = tuple(case for case in PEERS if word in case.name)
    run_peers(T2V_A14B, stores.get(T2V_A14B, "bf16", "first"), cases, vram_bytes=PEER_VRAM_BYTES)


def _against_peers(figures: Sequence[Figure]) -> Iterator[Figure]:
    """diffusers' forwards against ours, where one run measured both."""
    ours = {f.section: f.value for f in figures if f.what == "forward, resident" and f.value}
    for figure in figures:
        if figure.section != "peers" or not figure.what.endswith(": forward") or not figure.value:
            continue
        case = figure.what.partition(",")[0]
        if ours.get(case):
            what = f"{figure.what.removesuffix(': forward')}, against ours resident"
            yield Figure("peers", what, figure.value / ours[case], "x")


if __name__ == "__main__":
    sys.exit(main())
