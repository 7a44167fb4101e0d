"""Runs a command under a hard limit of host memory and says how much it took.

    python -m benchmarks.confine --memory-max 117GB [--drop-caches] [--json FILE] -- COMMAND ...

The command runs in a child group of cgroup v2 with `memory.max` set and swap off, so past the
limit the kernel reclaims page cache first and then kills. The group and the processes are read ten
times a second until the command ends. Needs root, or a delegated group named by --parent.

What is measured, in bytes:
- `memory_peak`: the group's own high-water mark (memory.peak; the greatest sample where the kernel
  has none). Holds page cache that the kernel could take back at any moment.
- `held_peak`: the most of anon + shmem + kernel + file_mapped. Registered weights are mapped, pages
  that were only read are not, so this is what cannot be given back without slowing down.
- `anon_peak`, `file_peak`, ...: the greatest sample of each line of memory.stat.
- `resident_peak`: the greatest VmHWM of one process. `resident_anon_peak`, `resident_file_peak`:
  the most that all processes of the group had at once (RssAnon, RssFile).
- `gpu_peak`: the most that the whole card had in use less what it had before (NVML), CUDA contexts
  included; absent without a card.

Page cache is charged to the group that first read it. A file that was warm before the command began
is free of charge in it: use --drop-caches where the figure is to hold for a fresh machine. Memory
that the NVIDIA driver pins (cudaHostAlloc) may be charged to no group at all: the plan's sum, not
this figure, has the pinned ring for certain.
Left out: cgroup v1, and limits on anything but memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanfit.plan.amounts import parse_bytes

# Where cgroup v2 is mounted: alone, or beside v1 (then without the memory controller).
CGROUP_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
EVERY_S = 0.1
STAT_LINES = (
    "anon",
    "file",
    "file_mapped",
    "file_dirty",
    "shmem",
    "kernel",
    "unevictable",
    "inactive_file",
    "active_file",
)
HELD_LINES = ("anon", "shmem", "kernel", "file_mapped")
# The shell enters the group and becomes the command, so not one page is charged elsewhere.
_ENTER = 'echo $$ > "$1" && shift && exec "$@"'


class CannotConfine(RuntimeError):
    """This machine lets us make no memory group."""


@dataclass
class Confined:
    """How a confined command ended and the most that it took. Bytes."""

    command: list[str]
    returncode: int  # negative: killed by that signal
    elapsed_s: float
    timed_out: bool
    memory_max: int | None
    memory_peak: int
    held_peak: int
    stat_peaks: dict[str, int]
    resident_peak: int
    resident_anon_peak: int
    resident_file_peak: int
    gpu_peak: int | None
    oom_kills: int
    refaults: int  # pages of files read again because they had been taken away
    samples: int
    stdout: str = field(repr=False)


@dataclass
class _Peaks:
    """The greatest of each figure so far."""

    most: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    def take(self, figures: Mapping[str, int]) -> None:
        for name, value in figures.items():
            self.most[name] = max(self.most.get(name, 0), value)

    def __getitem__(self, name: str) -> int:
        return self.most.get(name, 0)


def confined(
    command: Sequence[str],
    *,
    memory_max: int | None,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    drop_caches: bool = False,
    parent: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Confined:
    """Runs `command` in a group limited to `memory_max` bytes (None: measured, not limited).

    Its stdout is kept, and given line by line to `on_line`; stderr is the caller's. Past
    `timeout_s` every process of the group is killed. Without a limit a group without the memory
    controller will do, and its memory figures are 0. Raises CannotConfine.
    """
    if drop_caches:
        drop_page_cache()
    with _group(parent or cgroup_root(), memory_max) as group:
        gpu_before = gpu_used_bytes()
        began_s = time.perf_counter()
        process = subprocess.Popen(
            ["/bin/sh", "-c", _ENTER, "sh", str(group / "cgroup.procs"), *command],
            stdout=subprocess.PIPE,
            env=None if env is None else {**os.environ, **env},
        )
        peaks, lines = _Peaks(), _Lines(process, on_line)
        timed_out = False
        while process.poll() is None:
            _sample(group, peaks)
            lines.drain()
            timed_out = timeout_s is not None and time.perf_counter() - began_s > timeout_s
            if timed_out:
                _kill(group)
                process.wait()
            time.sleep(EVERY_S)
        elapsed_s = time.perf_counter() - began_s
        peaks.take({"current": _number(group / "memory.current")})
        kernel_peak = _number(group / "memory.peak")
        return Confined(
            command=list(command),
            returncode=process.returncode,
            elapsed_s=elapsed_s,
            timed_out=timed_out,
            memory_max=memory_max,
            memory_peak=max(kernel_peak, peaks["current"]),
            held_peak=peaks["held"],
            stat_peaks={name: peaks[name] for name in STAT_LINES},
            resident_peak=peaks["resident"],
            resident_anon_peak=peaks["resident_anon"],
            resident_file_peak=peaks["resident_file"],
            gpu_peak=None if gpu_before is None else max(0, peaks["gpu"] - gpu_before),
            oom_kills=_fields(group / "memory.events").get("oom_kill", 0),
            refaults=_fields(group / "memory.stat").get("workingset_refault_file", 0),
            samples=peaks.samples,
            stdout=lines.finish(),
        )


def cgroup_root() -> Path:
    """Where this machine has cgroup v2. Raises CannotConfine."""
    for root in CGROUP_ROOTS:
        if (root / "cgroup.procs").is_file():
            return root
    raise CannotConfine(f"No cgroup v2 at any of {', '.join(map(str, CGROUP_ROOTS))}")


def drop_page_cache() -> None:
    """Writes dirty pages and drops clean ones, of the whole machine. Raises CannotConfine."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise CannotConfine(f"The page cache cannot be dropped: {error.strerror}") from None


def gpu_used_bytes(index: int = 0) -> int | None:
    """What all processes together have in use on a card; None without NVML or a card."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()  # counted: only the first one costs anything
        used = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used
        return int(used)
    except Exception:  # noqa: BLE001  no module, no driver, no card: NVML has an error for each
        return None


@contextmanager
def _group(parent: Path, memory_max: int | None) -> Iterator[Path]:
    """A new memory group below `parent`, removed in the end with whatever still runs in it."""
    group = parent / f"wanfit-{os.getpid()}-{time.monotonic_ns()}"
    try:
        control = parent / "cgroup.subtree_control"
        with suppress(OSError) if memory_max is None else nullcontext():
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
        group.mkdir()
        if memory_max is not None:
            (group / "memory.swap.max").write_text("0")
            (group / "memory.max").write_text(str(memory_max))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        what = f"{error.strerror} ({error.filename or parent})"
        raise CannotConfine(f"No memory group of cgroup v2 here: {what}") from None
    try:
        yield group
    finally:
        _kill(group)
        _remove(group)


def _kill(group: Path) -> None:
    """SIGKILL to every process of the group, and to no other."""
    with suppress(OSError):
        (group / "cgroup.kill").write_text("1")
        return
    for pid in _pids(group):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _remove(group: Path, patience_s: float = 10.0) -> None:
    until_s = time.perf_counter() + patience_s
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.perf_counter() > until_s:
                raise
            time.sleep(0.05)


def _sample(group: Path, peaks: _Peaks) -> None:
    stat = _fields(group / "memory.stat")
    figures = {name: stat.get(name, 0) for name in STAT_LINES}
    figures["held"] = sum(stat.get(name, 0) for name in HELD_LINES)
    figures["current"] = _number(group / "memory.current")
    figures |= _resident(_pids(group))
    gpu = gpu_used_bytes()
    if gpu is not None:
        figures["gpu"] = gpu
    peaks.take(figures)
    peaks.samples += 1


def _resident(pids: Sequence[int]) -> dict[str, int]:
    """The greatest VmHWM of these processes, and the sums of their RssAnon and RssFile."""
    marks, anon, file = [0], 0, 0
    for pid in pids:
        with suppress(OSError):  # it has just ended
            status = _fields(Path(f"/proc/{pid}/status"), scale=1024)  # the kernel's kB are KiB
            marks.append(status.get("VmHWM:", 0))
            anon += status.get("RssAnon:", 0)
            file += status.get("RssFile:", 0)
    return {"resident": max(marks), "resident_anon": anon, "resident_file": file}


def _pids(group: Path) -> list[int]:
    return [int(word) for word in (group / "cgroup.procs").read_text().split()]


def _fields(file: Path, *, scale: int = 1) -> dict[str, int]:
    """First word -> second word of every line whose second word is a number; {} without a file."""
    text = file.read_text() if file.is_file() else ""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) * scale for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(file: Path) -> int:
    """The number in a file of the group; 0 where this kernel has no such file."""
    words = file.read_text().split() if file.is_file() else []
    return int(words[0]) if words and words[0].isdigit() else 0


class _Lines:
    """The command's stdout, read without ever waiting for it."""

    def __init__(
        self, process: subprocess.Popen[bytes], on_line: Callable[[str], None] | None
    ) -> None:
        assert process.stdout is not None
        self._stream = process.stdout
        os.set_blocking(self._stream.fileno(), False)
        self._on_line = on_line
        self._whole = bytearray()
        self._told = 0  # bytes of whole lines given to on_line

    def drain(self) -> None:
        with suppress(BlockingIOError):
            while chunk := os.read(self._stream.fileno(), 1 << 16):
                self._whole += chunk
        end = self._whole.rfind(b"\n") + 1
        if self._on_line and end > self._told:
            for line in self._whole[self._told : end].decode(errors="replace").splitlines():
                self._on_line(line)
            self._told = end

    def finish(self) -> str:
        self.drain()
        self._stream.close()
        return self._whole.decode(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.confine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--memory-max", type=parse_bytes, metavar="SIZE", help="as 117GB or 8GiB")
    parser.add_argument("--drop-caches", action="store_true", help="drop the page cache first")
    parser.add_argument("--timeout", type=float, metavar="S", help="kill the command after this")
    parser.add_argument("--parent", type=Path, help="make the group in here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    try:
        result = confined(
            options.command,
            memory_max=options.memory_max,
            timeout_s=options.timeout,
            drop_caches=options.drop_caches,
            parent=options.parent,
            on_line=lambda line: print(line, flush=True),
        )
    except CannotConfine as error:
        print(error, file=sys.stderr)
        return 1
    figures: dict[str, Any] = asdict(result)
    del figures["stdout"]
    text = json.dumps(figures)
    print(text, file=sys.stderr)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return result.returncode if result.returncode >= 0 else 128 - result.returncode


if __name__ == "__main__":
    sys.exit(main())
