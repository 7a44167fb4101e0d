"""Installs the build of torch that suits this machine, into the environment that runs this file.

Why: on Linux the common index holds only the CUDA build, whose libraries weigh gigabytes. A machine
without an NVIDIA GPU has no use for them. What is tried, in this order:

1. torch of this version or later is here already: nothing is done.
2. An NVIDIA GPU is here, or this is not Linux: the common index.
3. No GPU: the `+cpu` build, from PyTorch's own index if that answers within two seconds.
4. No GPU: the `+cpu` build, from a directory that pip is told to look in (its find-links setting).
5. No GPU, and none of these has it: the common index after all, with a line that says so.

Standard library only, because it runs before anything is installed. Left out: builds for ROCm, XPU
and particular CUDA versions. Whoever needs one installs it into the environment first; rule 1 then
keeps it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

OLDEST_TORCH = (2, 9)  # as in pyproject.toml; a test holds that the two agree
CPU_INDEX_URL = "https://download.pytorch.org/whl/cpu"  # pytorch.org, "Start Locally", CPU
PROBE_S = 2.0

Build = Literal["cpu", "gpu"]


def say(line: str) -> None:
    """Print one line at once, so that it stands before what pip prints."""
    sys.stdout.write(f"install_torch: {line}\n")
    sys.stdout.flush()


def installed_version() -> str | None:
    """The version of torch in this environment, or None."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_new_enough(version: str) -> bool:
    """Whether a version such as "2.13.0+cpu" is at least OLDEST_TORCH."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST_TORCH


def pinned_version(constraints: Path) -> str:
    """The version in the line `torch==VERSION` of a pip constraints file."""
    match = re.search(r"^torch==([^\s;+]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f"install_torch: no line torch==VERSION in {constraints}")
    return match[1]


def has_nvidia_gpu(root: Path) -> bool:
    """Whether the NVIDIA driver shows itself below `root`, or by nvidia-smi listing a card.

    nvidia-smi counts only when it lists a card: CUDA containers have the program on machines that
    have no GPU.
    """
    if (root / "dev/nvidia0").exists() or (root / "proc/driver/nvidia/version").exists():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def answers(index_url: str, limit_s: float = PROBE_S) -> bool:
    """Whether the index serves its page for torch within `limit_s`, name look-up included.

    In a thread, because no timeout of the standard library covers the name look-up.
    """
    reached: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(f"{index_url}/torch/", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as reply:
                reached.append(reply.status == 200)
        except (OSError, ValueError):  # URLError, timeouts and TLS errors are all OSError
            reached.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    return reached == [True]


def pip_install(*arguments: str) -> bool:
    """Run `pip install` for this interpreter; True when it succeeded."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode == 0


def install_cpu(version: str, index_url: str) -> bool:
    """Install `torch==VERSION+cpu` from the CPU index, or from pip's find-links directories.

    Its dependencies are left to the installation of wanfit, which pins them.
    """
    requirement = f"torch=={version}+cpu"
    if answers(index_url):
        say(f"no NVIDIA GPU here: {requirement} from {index_url}")
        if pip_install("--no-deps", "--index-url", index_url, requirement):
            return True
    else:
        say(f"no NVIDIA GPU here, and {index_url} does not answer: {requirement} from find-links")
    # Without an index, pip looks only where find-links points, and says itself which file fits.
    return pip_install("--no-deps", "--no-index", requirement)


def install(version: str, build: Build, index_url: str) -> bool:
    """Install torch of that version; True when it is there afterwards."""
    if build == "gpu":
        say(f"NVIDIA GPU here: torch {version} with CUDA, from the common index")
        # pip prefers 2.13.0+cpu to 2.13.0 where it is offered both.
        return pip_install(f"torch=={version},!={version}+cpu")
    if not sys.platform.startswith("linux"):
        say(f"torch {version} from the common index")
        return pip_install(f"torch=={version}")
    if install_cpu(version, index_url):
        return True
    say(
        "found no CPU build; falling back to the common index, whose Linux build brings gigabytes "
        f"of CUDA libraries. To avoid them, install torch from {index_url} into this environment"
    )
    return pip_install(f"torch=={version}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--constraints", type=Path, required=True, help="file with torch==VERSION")
    parser.add_argument("--build", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument(
        "--cpu-index",
        default=os.environ.get("WANFIT_TORCH_CPU_INDEX", CPU_INDEX_URL),
        help="index with CPU builds; or set WANFIT_TORCH_CPU_INDEX",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="where dev/ and proc/ are looked for"
    )
    options = parser.parse_args(arguments)

    present = installed_version()
    if present is not None and is_new_enough(present):
        say(f"torch {present} is here already")
        return 0
    build: Build = options.build
    if options.build == "auto":
        build = "gpu" if has_nvidia_gpu(options.root) else "cpu"
    version = pinned_version(options.constraints)
    return 0 if install(version, build, options.cpu_index.rstrip("/")) else 1


if __name__ == "__main__":
    raise SystemExit(main())
