"""What scripts/install_torch.py installs on each kind of machine.

The real script and the real pip run in a real, empty environment. What differs from life: the
torch wheels are a few hundred bytes, and the indexes are two folders served on the loopback.
"""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import threading
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pip
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/install_torch.py"


def write_wheel(folder: Path, version: str) -> None:
    """A torch of that version with nothing in it but its own metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and notes each path that is asked for."""

    asked: list[str]

    def send_head(self) -> Any:
        self.asked.append(self.path)
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@dataclass
class Machine:
    """An empty environment, a served folder per index, and what the script is told about them."""

    path: Path
    url: str
    asked: list[str]
    arguments: list[str] = field(default_factory=list)

    @property
    def site_packages(self) -> Path:
        (found,) = self.path.glob("venv/lib/python*/site-packages")
        return found

    def offer(self, where: str, version: str) -> None:
        """Put a wheel into the folder "cpu" (PyTorch's index), "common" or "local"."""
        folder = self.path / ("local" if where == "local" else f"served/{where}/torch")
        write_wheel(folder, version)

    def have(self, version: str) -> None:
        """Unpack a wheel into the environment, as though it had been installed before."""
        write_wheel(self.path / "had", version)
        with zipfile.ZipFile(self.path / f"had/torch-{version}-py3-none-any.whl") as wheel:
            wheel.extractall(self.site_packages)

    def add_gpu(self) -> None:
        (self.path / "root/dev").mkdir(parents=True)
        (self.path / "root/dev/nvidia0").touch()

    def add_nvidia_smi(self, shell: str) -> None:
        program = self.path / "bin/nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{shell}\n")
        program.chmod(0o755)

    def run(self, cpu_index: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the script as the Makefile does, on a machine without network."""
        (self.path / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
        environment = {
            "PATH": f"{self.path / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.path),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.url}/common",
            "PIP_FIND_LINKS": str(self.path / "local"),
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "0",
            "NO_PROXY": "*",
        }
        command: list[str | Path] = [self.path / "venv/bin/python", SCRIPT]
        command += ["--constraints", self.path / "constraints.txt", "--root", self.path / "root"]
        command += ["--cpu-index", cpu_index or f"{self.url}/cpu", *self.arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, cwd=self.path
        )

    def installed(self) -> str | None:
        """The version of torch that the environment holds now."""
        found = [path.name for path in self.site_packages.glob("torch-*.dist-info")]
        return found[0].removeprefix("torch-").removesuffix(".dist-info") if found else None

    def asked_of(self, index: str) -> list[str]:
        return [path for path in self.asked if path.startswith(f"/{index}/")]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with no GPU, no torch, and no index or folder that offers any."""
    for folder in ("served", "local", "root"):
        (tmp_path / folder).mkdir()
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "venv")
    asked: list[str] = []
    handler = type("NotingHandler", (Handler,), {"asked": asked})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "served"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = Machine(tmp_path, f"http://127.0.0.1:{server.server_port}", asked)
    # This pip, and nothing else of the environment that the tests run in.
    (tmp_path / "only-pip").mkdir()
    (tmp_path / "only-pip/pip").symlink_to(Path(pip.__file__).parent)
    (made.site_packages / "pip.pth").write_text(f"{tmp_path / 'only-pip'}\n")
    yield made
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("version", ["2.9.0", "2.13.0+cu130", "3.0.1"])
def test_a_torch_that_is_new_enough_stays(machine: Machine, version: str) -> None:
    """Whatever build is there is kept, and no index is asked."""
    machine.have(version)
    machine.offer("cpu", "2.13.0+cpu")
    assert machine.run().returncode == 0
    assert machine.installed() == version
    assert machine.asked == []


def test_a_torch_that_is_too_old_is_replaced(machine: Machine) -> None:
    machine.have("2.8.1")
    machine.offer("cpu", "2.13.0+cpu")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0+cpu"


def test_no_gpu_takes_the_cpu_build_from_pytorchs_index(machine: Machine) -> None:
    """The pinned version is taken, not the newest, and the common index is not asked."""
    machine.offer("cpu", "2.13.0+cpu")
    machine.offer("cpu", "2.14.0+cpu")
    machine.offer("common", "2.13.0")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0+cpu"
    assert machine.asked_of("common") == []


def test_no_gpu_and_no_pytorch_index_takes_the_local_wheel(machine: Machine) -> None:
    """The folder in pip's find-links setting serves, and the common index is not asked."""
    machine.offer("local", "2.13.0+cpu")
    machine.offer("common", "2.13.0")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0+cpu"
    assert machine.asked_of("common") == []


def test_pytorchs_index_without_the_pinned_version_is_passed_over(machine: Machine) -> None:
    machine.offer("cpu", "2.12.0+cpu")
    machine.offer("local", "2.13.0+cpu")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0+cpu"


def test_the_common_index_is_the_last_resort_and_says_why_it_is_big(machine: Machine) -> None:
    """A local wheel of another version does not count."""
    machine.offer("local", "2.12.0+cpu")
    machine.offer("common", "2.13.0")
    result = machine.run()
    assert result.returncode == 0
    assert machine.installed() == "2.13.0"
    (line,) = [line for line in result.stdout.splitlines() if "gigabytes" in line]
    assert "CUDA" in line


def test_no_torch_anywhere_fails(machine: Machine) -> None:
    assert machine.run().returncode == 1
    assert machine.installed() is None


def test_a_gpu_takes_the_cuda_build_though_a_cpu_wheel_lies_at_hand(machine: Machine) -> None:
    """pip alone would prefer 2.13.0+cpu, which sorts after 2.13.0."""
    machine.add_gpu()
    machine.offer("cpu", "2.13.0+cpu")
    machine.offer("local", "2.13.0+cpu")
    machine.offer("common", "2.13.0")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0"
    assert machine.asked_of("cpu") == []


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "2.13.0"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "2.13.0+cpu"),
        ("echo 'No devices were found'", "2.13.0+cpu"),
    ],
)
def test_nvidia_smi_counts_only_when_it_lists_a_card(
    machine: Machine, shell: str, expected: str
) -> None:
    machine.add_nvidia_smi(shell)
    machine.offer("cpu", "2.13.0+cpu")
    machine.offer("common", "2.13.0")
    assert machine.run().returncode == 0
    assert machine.installed() == expected


def test_build_cpu_overrides_the_gpu(machine: Machine) -> None:
    machine.add_gpu()
    machine.arguments = ["--build", "cpu"]
    machine.offer("cpu", "2.13.0+cpu")
    assert machine.run().returncode == 0
    assert machine.installed() == "2.13.0+cpu"


def test_an_index_that_never_answers_costs_two_seconds(machine: Machine) -> None:
    """It accepts the connection and is silent, as behind some firewalls."""
    machine.offer("local", "2.13.0+cpu")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started_s = time.monotonic()
        answered = runpy.run_path(str(SCRIPT))["answers"](url)
        took_s = time.monotonic() - started_s
        assert machine.run(cpu_index=url).returncode == 0
    assert answered is False
    assert 1.5 < took_s < 3.0
    assert machine.installed() == "2.13.0+cpu"


def test_constraints_without_torch_are_refused(tmp_path: Path) -> None:
    """One line that names the file, and no traceback."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torchvision==1.0\n")
    pinned_version = runpy.run_path(str(SCRIPT))["pinned_version"]
    with pytest.raises(SystemExit, match=re.escape(str(constraints))):
        pinned_version(constraints)


def test_the_oldest_torch_is_the_one_in_pyproject() -> None:
    """The script cannot read pyproject.toml's requirement with pip's rules, so it repeats it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [line for line in project["dependencies"] if line.startswith("torch>")]
    oldest = runpy.run_path(str(SCRIPT))["OLDEST_TORCH"]
    assert requirement == "torch>=" + ".".join(map(str, oldest))


def test_constraints_satisfy_pyproject() -> None:
    """Every package that pyproject.toml names is pinned, at a version that it admits."""
    pins = (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {canonicalize_name(name): version for name, version in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line
