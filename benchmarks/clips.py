"""Makes clips one after the other in one process, through `wanfit.service.generate`.

    python -m benchmarks.clips JOBS.json

JOBS.json is a list of {"name", "options", "stop_after_steps", "hold_after_steps"}: options are the
arguments of `generate` ("with_image": true gives it a picture). One JSON line per clip: its report,
or its error, when each stage and step began, and what the process holds after it. A clip may stop
after some steps (`stop_after_steps`), or wait there for a line on stdin (`hold_after_steps`).

Times count from the start of this process, so imports are in them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfit.errors import WanfitError
from wanfit.events import Event, StageBegan, StepDone, WeightsMoved

KIB = 1024  # the "kB" of /proc are KiB


class Stopped(Exception):
    """The clip has gone as far as it was to go."""


def since_start_s() -> float:
    """Seconds since this process began (proc(5): starttime in clock ticks since the boot)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started_s


@dataclass(slots=True)
class _Watch:
    """Takes a clip's events, and stops or holds it where it is told to."""

    stop_after_steps: int | None
    hold_after_steps: int | None
    clock_offset_s: float  # since_start_s() less time.perf_counter()
    began_s: dict[str, float] = field(default_factory=dict)  # stage -> when
    steps_s: list[float] = field(default_factory=list)  # when each denoising step was done
    moved: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        now_s = time.perf_counter() + self.clock_offset_s
        match event:
            case StageBegan(stage=stage):
                self.began_s[stage] = now_s
            case WeightsMoved():
                fields = {name: getattr(event, name) for name in event.__slots__}
                if event.first_ready_s is not None:
                    fields["first_ready_s"] = event.first_ready_s + self.clock_offset_s
                self.moved.append(fields)
            case StepDone(stage="denoise", step=step):
                self.steps_s.append(now_s)
                if step == self.hold_after_steps:
                    print(json.dumps({"held": step, "memory": memory()}), flush=True)
                    sys.stdin.readline()
                if step == self.stop_after_steps:
                    raise Stopped


def memory() -> dict[str, int]:
    """What this process holds now, in bytes: resident by kind, the peak, and its share (PSS)."""
    status = _sizes(Path("/proc/self/status"))
    shares = _sizes(Path("/proc/self/smaps_rollup"))
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")
    held = {name: status.get(name, 0) for name in names}
    return held | {name: shares.get(name, 0) for name in ("Pss", "Pss_Anon", "Pss_File")}


def gpu_memory() -> dict[str, int]:
    """What torch holds on the GPU now, and what the card has in use with CUDA's context.

    {} where torch is not loaded or sees no GPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "used": total - free,
    }


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """One clip: what the line about it holds."""
    from wanfit.service import generate

    options = dict(job["options"])
    if options.pop("with_image", False):
        from PIL import Image

        options["image"] = Image.new("RGB", (640, 352), (200, 60, 40))
    offset_s = since_start_s() - time.perf_counter()
    watch = _Watch(job.get("stop_after_steps"), job.get("hold_after_steps"), offset_s)
    told: dict[str, Any] = {"clip": job["name"], "began_s": since_start_s()}
    try:
        report = generate(on_event=watch, **options)
        told |= {"ok": True, "report": report.to_json()}
    except Stopped:
        told |= {"ok": True, "report": None}
    except WanfitError as error:
        told |= {"ok": False, "error": error.code, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001  the clips after it are to be made all the same
        traceback.print_exc()
        told |= {"ok": False, "error": type(error).__name__, "message": str(error)}
    return told | {
        "ended_s": since_start_s(),
        "stage_began_s": watch.began_s,
        "steps_s": watch.steps_s,
        "moved": watch.moved,
        "memory": memory(),
        "gpu": gpu_memory(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    (file,) = sys.argv[1:] if arguments is None else arguments
    for job in json.loads(Path(file).read_text(encoding="utf-8")):
        print(json.dumps(run_job(job)), flush=True)
    return 0


def _sizes(file: Path) -> dict[str, int]:
    """Name -> bytes of the lines "Name:  123 kB"; {} for a file that this kernel lacks."""
    if not file.is_file():
        return {}
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * KIB for row in rows if row[-1:] == ["kB"]}


if __name__ == "__main__":
    sys.exit(main())
