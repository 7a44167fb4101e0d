"""Figures of a benchmark: printed one JSON line each as they come, then a table against the bars.

    python -m benchmarks.figures FIGURES.jsonl --title "..." [--into benchmarks/RESULTS.md]

A run that is killed half way has printed all that it knew. The lines can be made into a table, and
put into RESULTS.md, on another machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value, and what it must reach."""

    section: str
    what: str
    value: float | bool | None  # None: not measured, and `detail` says why
    unit: str = ""
    at_most: float | None = None  # the bar; for a bool the bar is True where `must` is set
    at_least: float | None = None
    must: bool = False
    floor: float | None = None  # what no implementation could better, in the same unit
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None where there is no bar. What was not measured does not pass."""
        if self.at_most is None and self.at_least is None and not self.must:
            return None
        if self.value is None:
            return False
        if self.must:
            return bool(self.value)
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


def figure_line(figure: Figure) -> str:
    """The figure as one JSON line, which `read_figures` reads."""
    return json.dumps({"figure": _rounded(asdict(figure)), "passed": figure.passed})


def say(figure: Figure) -> None:
    """Prints it on stdout."""
    print(figure_line(figure), flush=True)


def note(section: str, **fields: Any) -> None:
    """A JSON line that is no figure: what was done, raw numbers, what went wrong."""
    print(json.dumps({"note": section, **_rounded(fields)}), flush=True)


def read_figures(lines: Iterable[str]) -> list[Figure]:
    """The figures among lines of output; of two with the same name the later one."""
    found: dict[tuple[str, str], Figure] = {}
    for line in lines:
        if line.startswith('{"figure"'):
            figure = Figure(**json.loads(line)["figure"])
            found[figure.section, figure.what] = figure
    return list(found.values())


def table(figures: Sequence[Figure]) -> str:
    """Markdown: what, measured, bar, pass or fail, floor."""
    rows = ["| what | measured | bar | | floor |", "| --- | ---: | ---: | --- | ---: |"]
    for figure in figures:
        word = {None: "", True: "pass", False: "FAIL"}[figure.passed]
        cells = (
            f"{figure.section}: {figure.what}",
            _shown(figure.value, figure.unit),
            _bar(figure),
            word,
            "" if figure.floor is None else _shown(figure.floor, figure.unit),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def machine_line() -> str:
    """The date, the device with its driver, and the versions that matter, as RESULTS.md has them.

    Asks the driver, and leaves torch alone: a process that only drives others needs none.
    """
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "diffusers"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{date.today().isoformat()}, {_device()}, {', '.join(versions)}"


def results_section(
    title: str, machine: str, commands: Sequence[str], figures: Sequence[Figure]
) -> str:
    """A section of RESULTS.md: machine and commands, the table, the raw figures."""
    raw = "\n".join(json.dumps(_rounded(asdict(figure))) for figure in figures)
    ran = ", ".join(f"`{command}`" for command in commands)
    return (
        f"## {title}\n{machine}: {ran}\n\n{table(figures)}\n\n"
        f"<details><summary>Raw figures</summary>\n\n```json\n{raw}\n```\n\n</details>\n"
    )


def insert_section(results: Path, section: str) -> None:
    """Puts the section before all others: RESULTS.md has the newest first."""
    text = results.read_text(encoding="utf-8")
    at = text.find("\n## ")
    at = len(text) if at < 0 else at + 1
    results.write_text(f"{text[:at]}{section}\n{text[at:]}", encoding="utf-8")


def _device() -> str:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
        return f"{name}, driver {nvml.nvmlSystemGetDriverVersion()}"
    except Exception:  # noqa: BLE001  no module, no driver, no card: NVML has an error for each
        return f"cpu ({platform.machine()})"


def _shown(value: float | bool | None, unit: str) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    digits = 0 if abs(value) >= 1000 else 3 if unit == "x" else 2
    return f"{value:,.{digits}f} {unit}".strip()


def _bar(figure: Figure) -> str:
    if figure.must:
        return "yes"
    if figure.at_most is not None:
        return f"<= {_shown(figure.at_most, figure.unit)}"
    return "" if figure.at_least is None else f">= {_shown(figure.at_least, figure.unit)}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.figures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="+", help="output of benchmarks.fit")
    parser.add_argument("--title", default="Fit: weights that stream, a plan that holds")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the section into this file")
    options = parser.parse_args(arguments)
    lines = [line for file in options.files for line in file.read_text().splitlines()]
    runs = [json.loads(line) for line in lines if line.startswith('{"run"')]
    machine = runs[-1]["run"] if runs else machine_line()
    section = results_section(
        options.title, machine, [run["command"] for run in runs], read_figures(lines)
    )
    if options.into:
        insert_section(options.into, section)
    else:
        print(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
