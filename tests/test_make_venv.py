"""What scripts/make_venv.sh does with the Pythons that it finds.

The real script runs; the interpreters are small shell programs that pass on to the real one, except
for what a fresh machine lacks. pip comes from the wheel inside the real interpreter's ensurepip.
"""

from __future__ import annotations

import ensurepip
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/make_venv.sh"
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"

PASS_ON = f'exec {BASE_PYTHON} "$@"'
# A Python that answers the version check with "no", as 3.10 and 3.14 do.
UNSUPPORTED = "exit 1"
# Debian's Python without its package python3-venv.
NO_ENSUREPIP = f'case "$*" in *"import ensurepip") exit 1 ;; esac; {PASS_ON}'
# The same on a machine that has no pip either.
BARE = f'case "$*" in *"import pip") exit 1 ;; esac; {NO_ENSUREPIP}'


def run(folder: Path, pythons: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a machine that has these Pythons, by name, and no network."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, shell in pythons.items():
        (programs / name).write_text(f"#!/bin/sh\n{shell}\n")
        (programs / name).chmod(0o755)
    for name in ("rm", "sh"):
        if not (programs / name).exists():
            (programs / name).symlink_to(f"/bin/{name}")
    environment = {
        "PATH": str(programs),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(Path(ensurepip.__file__).parent / "_bundled"),
        **more,
    }
    return subprocess.run(
        [str(SCRIPT), str(folder / "venv")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def pip_works(folder: Path) -> bool:
    command = [str(folder / "venv/bin/python"), "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_an_unsupported_python3_is_passed_over_and_a_good_environment_is_kept(
    tmp_path: Path,
) -> None:
    """The next interpreter is taken; a second run changes nothing, even with no Python left."""
    assert run(tmp_path, {"python3": UNSUPPORTED, "python3.11": PASS_ON}).returncode == 0
    assert pip_works(tmp_path)
    mark = tmp_path / "venv/mark"
    mark.touch()
    assert run(tmp_path, {"python3": UNSUPPORTED, "python3.11": UNSUPPORTED}).returncode == 0
    assert mark.exists()


def test_without_ensurepip_the_machines_pip_is_used(tmp_path: Path) -> None:
    result = run(tmp_path, {"python3": NO_ENSUREPIP})
    assert result.returncode == 0, result.stderr
    assert pip_works(tmp_path)


@pytest.mark.parametrize(
    ("pythons", "advice"),
    [
        ({"python3": UNSUPPORTED}, "no Python 3.11, 3.12 or 3.13"),
        ({"python3": BARE}, "apt-get install python3-venv"),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    tmp_path: Path, pythons: dict[str, str], advice: str
) -> None:
    """And no half-made environment stays."""
    result = run(tmp_path, pythons)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert advice in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_named_python_is_the_only_one_tried(tmp_path: Path) -> None:
    """PYTHON=python3.12 does not quietly become another Python."""
    result = run(tmp_path, {"python3": PASS_ON, "other": UNSUPPORTED}, PYTHON="other")
    assert result.returncode == 1
    assert "other" in result.stderr
