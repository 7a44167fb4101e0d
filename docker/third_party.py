"""Installs what an image lacks and keeps what its base has in a usable version, and says which.

A base may hold torch built for its card's driver; replacing it costs gigabytes and may break it. So
a package that we ask for by name is kept where its version is one that pyproject.toml accepts, and
is installed at the pin otherwise. A package that only others ask for is kept where they accept it:
its constraint is the range from the base's version to the pin, and uv prefers what is installed.
Without a base of interest everything comes at its pin.

Runs in the stage `tools`, whose Python has `packaging`; looks at another Python by asking it.
Left out: whether a kept package works; the build ends in a clip for that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LISTING = """
import importlib.metadata as m, json, sys
found = ((d.metadata["Name"], d.version) for d in m.distributions())
print(json.dumps([[name, version] for name, version in found if name]))
"""
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"

Fate = Literal["kept", "replaced", "installed"]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a package."""

    name: str
    before: str  # "" where the base has none
    after: str
    fate: Fate


def installed(python: str) -> dict[str, str]:
    """The packages that a Python sees: canonical name to version. The first on its path counts."""
    text = subprocess.run(
        [python, "-c", LISTING], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = {}
    for name, version in json.loads(text):
        found.setdefault(canonicalize_name(name), version)
    return found


def needs_of(project: Path, extras: Sequence[str]) -> list[Requirement]:
    """The requirements of a project and some of its extras."""
    table = tomllib.loads(project.read_text())["project"]
    optional = table.get("optional-dependencies", {})
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"third_party.py: no extra {', '.join(unknown)} in {project}")
    lines = [*table["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [Requirement(line) for line in lines]


def pins_of(lines: Iterable[str]) -> dict[str, str]:
    """Lines such as `av==18.1.0`: canonical name to version."""
    pins: dict[str, str] = {}
    for line in lines:
        name, found, version = line.partition("#")[0].strip().partition("==")
        if found:
            pins[canonicalize_name(name)] = version
    return pins


def is_usable(need: Requirement, version: str) -> bool:
    """Whether a version is one that a requirement accepts; a release candidate is not."""
    try:
        return need.specifier.contains(Version(version), prereleases=False)
    except InvalidVersion:
        return False


def constraints(
    needs: Sequence[Requirement], pins: Mapping[str, str], before: Mapping[str, str]
) -> list[str]:
    """One line per pinned or kept package."""
    by_name: dict[str, Requirement] = {canonicalize_name(need.name): need for need in needs}
    lines = []
    for name in sorted({*pins, *by_name}):
        have, pin = before.get(name), pins.get(name)
        if have is not None and name in by_name and is_usable(by_name[name], have):
            lines.append(f"{name}=={have}")
        elif pin is not None and have is not None and name not in by_name and _is_version(have):
            low, high = sorted((have, pin), key=Version)
            lines.append(f"{name}>={Version(low).public},<={high}")
        elif pin is not None:
            lines.append(f"{name}=={pin}")
    return lines


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def compare(before: Mapping[str, str], after: Mapping[str, str], asked: set[str]) -> list[Row]:
    """What an installation did; of what was there already, only what was asked for."""
    rows = []
    for name, version in sorted(after.items()):
        have = before.get(name)
        if have is None:
            rows.append(Row(name, "", version, "installed"))
        elif have != version:
            rows.append(Row(name, have, version, "replaced"))
        elif name in asked:
            rows.append(Row(name, have, version, "kept"))
    return rows


def table_of(rows: Sequence[Row]) -> str:
    """For the log of a build."""
    width = max((len(row.name) for row in rows), default=7)
    lines = [f"{'package':{width}}  {'base had':18}  {'image has':18}  fate"]
    lines += [
        f"{row.name:{width}}  {row.before or '-':18}  {row.after:18}  {row.fate}" for row in rows
    ]
    count = {
        fate: sum(row.fate == fate for row in rows) for fate in ("kept", "replaced", "installed")
    }
    lines.append(", ".join(f"{number} {fate}" for fate, number in count.items()))
    return "\n".join(lines)


def find_python(version_spec: str = ">=3.11,<3.14") -> str:
    """The base's Python: the one that `python3` is, of a version that we support."""
    lines = subprocess.run(
        [
            "sh",
            "-c",
            "command -v python3 && python3 -c 'import platform as p; print(p.python_version())'",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    if not Requirement(f"python{version_spec}").specifier.contains(lines[1]):
        raise SystemExit(
            f"third_party.py: the base has Python {lines[1]}; wanfit needs {version_spec}"
        )
    return lines[0]


def install(uv: str, python: str, needs: Sequence[Requirement], lines: Sequence[str]) -> None:
    """By uv, wheels only: nothing is compiled."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "constraints.txt"
        file.write_text("\n".join(lines) + "\n")
        command = [uv, "pip", "install", "--python", python, "--break-system-packages"]
        command += ["--only-binary", ":all:", "--constraint", str(file), *map(str, needs)]
        code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise SystemExit(f"third_party.py: uv ended with {code}; it said why above")


def main(words: Sequence[str] | None = None) -> None:
    """Decides, installs, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--uv", default="uv")
    parser.add_argument("--python", help="whose packages; default: python3 of the PATH")
    parser.add_argument("--need", action="append", default=[], help="a requirement")
    parser.add_argument("--pin", action="append", default=[], help="name==version")
    parser.add_argument("--project", type=Path, help="a pyproject.toml with further requirements")
    parser.add_argument("--extras", default="", help="of that project, with commas")
    parser.add_argument("--pins", type=Path, help="a file of name==version")
    parser.add_argument("--path", help="a directory for Python to look for packages in")
    parser.add_argument("--dry-run", action="store_true", help="print the constraints only")
    given = parser.parse_args(words)

    python = given.python or find_python()
    needs = [Requirement(text) for text in given.need]
    if given.project:
        needs += needs_of(given.project, [word for word in given.extras.split(",") if word])
    needs = [need for need in needs if need.marker is None or need.marker.evaluate()]
    pins = pins_of([*(given.pins.read_text().splitlines() if given.pins else ()), *given.pin])
    before = installed(python)
    lines = constraints(needs, pins, before)
    if given.dry_run:
        sys.stdout.write("\n".join(lines) + "\n")
        return
    install(given.uv, python, needs, lines)
    asked: set[str] = {canonicalize_name(need.name) for need in needs}
    asked |= {name for name, pin in pins.items() if before.get(name, pin) != pin}
    sys.stdout.write(f"{python}\n{table_of(compare(before, installed(python), asked))}\n")
    if given.path:
        site = subprocess.run([python, "-c", SITE], check=True, capture_output=True, text=True)
        (Path(site.stdout.strip()) / "wanfit.pth").write_text(given.path + "\n")


if __name__ == "__main__":
    main()
