"""docker/bootstrap.sh and `wanfit doctor`, run: what they find, and how wrong setups end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runpod.workers import TINY, variables
from wanfit.doctor.checks import Driver, check_driver, check_torch
from wanfit.doctor.torch_build import TorchBuild
from wanfit.plan.cards import card_named
from wanfit.plan.machine import catalogue_machine

ROOT = Path(__file__).parents[2]
SHELLCHECK = shutil.which("shellcheck")
UNFIT = 8


def bootstrap(
    tmp_path: Path, *arguments: str, **given: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs it with `wanfit` on the path, as the image has it; also gives its seconds."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "wanfit").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from wanfit.cli import main; main()' \"$@\"\n"
    )
    (programs / "wanfit").chmod(0o755)
    environment = variables(tmp_path / "data", **given)
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    began_s = time.monotonic()
    done = subprocess.run(
        [ROOT / "docker" / "bootstrap.sh", *arguments], env=environment, capture_output=True,
        text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    return done, time.monotonic() - began_s


class TestBootstrap:
    def test_it_becomes_the_worker(self, tmp_path: Path) -> None:
        """With a volume that has a cached model's place, on a CPU, with the demo model."""
        (tmp_path / "volume/huggingface-cache/hub").mkdir(parents=True)
        done, _ = bootstrap(
            tmp_path, "--test_input", json.dumps({"input": TINY}),
            WANFIT_VOLUME=str(tmp_path / "volume"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "completed successfully" in done.stdout
        table = done.stderr
        assert f"volume         {tmp_path}/volume\n" in table
        assert f"cached models  {tmp_path}/volume/huggingface-cache/hub\n" in table
        assert "allocator      expandable_segments:True\n" in table
        assert "in the answer" in table

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"WANFIT_VOLUME": "/no/such/volume"}, "attach the network volume"),
            ({"WANFIT_DEVICE": "auto"}, "Choose a GPU for the endpoint"),
            ({"WANFIT_MODEL": "t2v-a14b"}, "WANFIT_PULL=t2v-a14b"),
            ({"WANFIT_MODEL": "nonsense"}, "nonsense"),
            ({"WANFIT_MIN_FREE": "900TB"}, "larger disk"),
            ({"BUCKET_NAME": "clips"}, "set up by half"),
        ],
    )
    def test_wrong_setups_end_in_seconds_with_what_to_change(
        self, tmp_path: Path, given: dict[str, str], said: str
    ) -> None:
        done, took_s = bootstrap(tmp_path, **given)
        assert done.returncode == UNFIT, done.stderr
        assert said in done.stderr
        assert took_s < 20

    @pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
    def test_shellcheck_finds_nothing(self) -> None:
        assert SHELLCHECK is not None
        subprocess.run([SHELLCHECK, ROOT / "docker" / "bootstrap.sh"], check=True)


class TestDoctor:
    def test_json_has_checks_models_and_versions(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "from wanfit.cli import main; main()", "doctor", "--json"],
            env=variables(tmp_path / "data"), capture_output=True, text=True, check=False,
            cwd=tmp_path,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["ok"] is (done.returncode == 0)
        assert {"GPU", "RAM", "disk", "torch"} <= {check["name"] for check in found["checks"]}
        assert found["models"][0]["model"] == "demo"
        assert found["versions"]["torch"]

    @pytest.mark.parametrize(
        ("architectures", "card", "fits"),
        [
            (("sm_80", "sm_90"), "RTX 3090", True),  # code for 8.0 runs on 8.6
            (("sm_90",), "RTX 4090", False),
            (("sm_90", "compute_80"), "RTX 4090", True),  # compiled for it at first use
            (("sm_90a",), "H100 SXM", True),
            (("sm_100a", "sm_90"), "RTX 5090", False),
            (("sm_120",), "RTX 5090", True),
        ],
    )
    def test_code_for_the_card(self, architectures: tuple[str, ...], card: str, fits: bool) -> None:
        """CUDA's rules of compatibility between a build and a card."""
        build = TorchBuild("2", (13, 0), architectures, sees_cuda=True)
        answer = check_torch(build, catalogue_machine(card_named(card)))
        assert (answer.status == "ok") is fits
        assert bool(answer.change) is not fits

    def test_a_driver_too_old_for_torch(self) -> None:
        answer = check_driver(Driver("535.1", (12, 2)), (13, 0))
        assert answer is not None
        assert answer.status == "bad"
        assert "12.2" in answer.found
        assert check_driver(Driver("580.1", (13, 0)), (13, 0)).status == "ok"
