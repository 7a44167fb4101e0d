"""What `wanfit models` says of a search: as a table for people, as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfit.engine.weights.search import Findings, Found, command_for
from wanfit.engine.weights.shelf import network_title
from wanfit.plan.machine import read_machine
from wanfit.plan.verdict import Verdict, verdict
from wanfit.specs import DEMO, MODELS, ModelSpec

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 100  # ours: a file or a pipe has no width
MOST_UNREAD = 20  # lines; --json lists all


def listing_json(findings: Findings, checked: Mapping[Path, str]) -> dict[str, Any]:
    """The whole as plain values. `checked`: of --verify, path -> what was found."""
    return {
        "models": [_model_json(spec, findings, checked) for spec in MODELS],
        "adapters": [
            {
                "path": str(part.path),
                "models": [spec.name for spec in part.models],
                "expert": part.expert,
                "bytes": part.num_bytes,
            }
            for part in findings.adapters
        ],
        "broken": [{"path": str(one.path), "reason": one.reason} for one in findings.broken],
        "others": [{"path": str(one.path), "reason": one.reason} for one in findings.others],
        "searched": [
            {
                "path": str(one.place.path),
                "source": one.place.source,
                "exists": one.exists,
                "notes": one.notes,
            }
            for one in findings.places
        ],
    }


def _model_json(spec: ModelSpec, findings: Findings, checked: Mapping[Path, str]) -> dict[str, Any]:
    sampling = spec.sampling
    guidance = {"high_noise": sampling.guidance_high, "low_noise": sampling.guidance_low}
    best = findings.best(spec, "auto")
    usable = best if best and best.is_complete and best.runs_as_it_is else None
    return {
        "model": spec.name,
        "summary": spec.summary,
        "task": spec.task,
        "sizes": [f"{width}x{height}" for width, height in spec.presets],
        "num_frames": sampling.num_frames,
        "fps": sampling.fps,
        "num_inference_steps": sampling.num_inference_steps,
        "shift": sampling.shift,
        "solver": sampling.solver,
        "guidance": {expert: guidance[expert] for expert in spec.experts},
        "weights": str(usable.path) if usable else None,
        "default_fits": _verdict_json(verdict(spec, read_machine(), None)),
        "found": [_found_json(found, checked) for found in findings.of(spec)],
    }


def _found_json(found: Found, checked: Mapping[Path, str]) -> dict[str, Any]:
    ready = found.is_complete and found.runs_as_it_is
    machine = read_machine(weights=found.path)
    return {
        "kind": found.kind,
        "path": str(found.path),
        "format": found.format,
        "storage": found.storage,
        "precision": found.precision,
        "bytes": found.num_bytes,
        "complete": found.is_complete,
        "missing": list(found.missing),
        "runs_as_it_is": ready,
        "convert": command_for(found) if found.is_complete and not found.runs_as_it_is else None,
        "parts": {
            name: {
                "path": str(part.path),
                "naming": part.naming,
                "storage": part.storage,
                "bytes": part.num_bytes,
            }
            for name, part in (found.parts or {}).items()
        },
        "fits": _verdict_json(verdict(found.spec, machine, found.precision)),
        "verified": checked.get(found.path),
    }


def _verdict_json(answer: Verdict) -> dict[str, Any]:
    return {
        "fits": answer.fits,
        "reason": None if answer.fits else answer.words,
        "device": answer.device,
        "device_peak_bytes": answer.device_peak_bytes,
        "host_peak_bytes": answer.host_peak_bytes,
    }


def print_listing(findings: Findings, checked: Mapping[Path, str]) -> None:
    """The whole for people, on stdout."""
    from rich import box
    from rich.table import Table

    console = _console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("on this machine", ratio=1, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("fits here", width=24)
    for spec in MODELS:
        rows = [_row(found, checked) for found in findings.of(spec)]
        if not rows:
            answer = verdict(spec, read_machine(), None)
            rows = [(f"nothing: wanfit pull {spec.name}", "", answer.line)]
        for i, row in enumerate(rows):
            table.add_row("" if i else spec.name, *row)
        table.add_section()
    console.print(table)
    for line in _lines(findings):
        console.print(line, soft_wrap=True)


def _row(found: Found, checked: Mapping[Path, str]) -> tuple[str, str, str]:
    """(what, size, verdict)."""
    state = "complete" if found.is_complete else f"missing: {', '.join(found.missing)}"
    words = (
        [found.storage, state] if found.kind == "store" else [found.format, found.storage, state]
    )
    lines = [f"{found.kind}: {', '.join(words)}"]
    if found.kind == "mix" and found.parts:
        lines += [
            f"{network_title(found.spec, name)}: {part.path}" for name, part in found.parts.items()
        ]
    else:
        lines.append(str(found.path))
    if found.is_complete and not found.runs_as_it_is:
        lines.append("quantised: wanfit convert makes a store of it")
    if not found.is_complete and found.spec != DEMO:
        lines.append(f"wanfit pull {found.spec.name} brings the whole")
    if found.path in checked:
        lines.append(checked[found.path])
    answer = verdict(found.spec, read_machine(weights=found.path), found.precision)
    return "\n".join(lines), _disk_size(found.num_bytes), answer.line


def _disk_size(num_bytes: int) -> str:
    """In the units of disks and downloads."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.1f} MB"


def _lines(findings: Findings) -> list[str]:
    """What stands below the table."""
    lines = []
    if findings.adapters:
        names = ", ".join(str(part.path) for part in findings.adapters[:MOST_UNREAD])
        lines.append(f"LoRA files, for wanfit convert --lora: {names}")
    lines += [f"unreadable: {one.reason}" for one in findings.broken[:MOST_UNREAD]]
    if len(findings.broken) > MOST_UNREAD:
        lines.append(f"and {len(findings.broken) - MOST_UNREAD} more unreadable; see --json")
    if findings.others:
        lines.append(f"{len(findings.others)} weight files of other models; see --json")
    looked = [f"{one.place.path}{'' if one.exists else ' (not there)'}" for one in findings.places]
    lines.append(f"looked in: {', '.join(looked)}")
    lines += [f"note: {note}" for one in findings.places for note in one.notes]
    return lines


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console
