"""`wanfit convert` as a person meets it: real processes, signals and files."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_cli import PATIENCE_S, WANFIT, here, only_error, wanfit
from wanfit.engine.weights.open import open_model
from wanfit.specs import DEMO

__all__ = ["here"]  # a fixture

CPU = torch.device("cpu")
# A convert in which every unit counts, and that says when the first one is on the disk.
SLOW_WANFIT = (
    sys.executable,
    "-c",
    """
import sys, time
from wanfit.cli import main
from wanfit.engine.weights import convert, writer
writer.SYNC_BYTES = 1
real = writer.UnitWriter.end_unit

def end_unit(self, unit):
    real(self, unit)
    print("a unit", flush=True)
    time.sleep(0.3)

writer.UnitWriter.end_unit = end_unit
main()
""",
)


def test_it_prints_the_path_and_says_the_rest_on_stderr(here: Path, random_demo_dir: Path) -> None:
    ended = wanfit(here, "convert", str(random_demo_dir), "--output", "store")
    assert ended.returncode == 0, ended
    assert ended.stdout == f"{here / 'store'}\n"
    lines = ended.stderr.splitlines()
    assert [line.partition(", ")[0] for line in lines[:3]] == [
        "transformer: bf16", "text encoder: bf16", "VAE: bf16",
    ]  # fmt: skip
    assert lines[3].startswith("umt5: 0.00 of 0.")
    assert lines[-1].startswith("demo in bf16: 0.")
    expected, opened = open_model(random_demo_dir, DEMO), open_model(here / "store", DEMO)
    found = opened.load_dit("high_noise", CPU, torch.bfloat16).state_dict()
    for name, tensor in expected.load_dit("high_noise", CPU, torch.bfloat16).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_json_is_the_report_and_nothing_else(here: Path, random_demo_dir: Path) -> None:
    ended = wanfit(
        here, "convert", str(random_demo_dir), "--output", "a/b", "--precision", "fp8", "--json"
    )
    assert ended.returncode == 0, ended
    report = json.loads(ended.stdout)
    assert report["output"] == str(here / "a/b")
    assert (report["model"], report["precision"]) == ("demo", "fp8")
    sizes = {path.name: path.stat().st_size for path in (here / "a/b").glob("*.safetensors")}
    assert report["files"] == sizes
    assert report["store_bytes"] == report["written_bytes"] == sum(sizes.values())
    assert report["mb_per_s"] > 0 < report["total_s"]
    assert open_model(here / "a/b", DEMO).precision == "fp8"


def test_a_terminal_shows_a_bar(here: Path, random_demo_dir: Path) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*WANFIT, "convert", str(random_demo_dir), "--output", "store"],
        cwd=here, stdout=subprocess.PIPE, stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:  # fmt: skip
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 65536):
                shown += piece
        except OSError:  # how a pty says that the other side is closed
            pass
        assert process.wait(PATIENCE_S) == 0
    os.close(leader)
    assert b"umt5" in shown
    assert "━".encode() in shown
    assert b"left" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_so_and_continues(
    number: signal.Signals, here: Path, random_demo_dir: Path
) -> None:
    arguments = ["convert", str(random_demo_dir), "--output", "store", "--json"]
    with subprocess.Popen(
        [*SLOW_WANFIT, *arguments], cwd=here, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "a unit\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 5, stderr
    assert stderr.splitlines()[-2:] == [
        "note: what was converted is kept; the same command continues there",
        "error: Interrupted, nothing half-written is left",
    ]
    assert [path.name for path in here.iterdir()] == [".store.partial"]
    ended = wanfit(here, *arguments)
    assert ended.returncode == 0, ended
    assert json.loads(ended.stdout)["resumed_bytes"] > 0
    assert [path.name for path in here.iterdir()] == ["store"]
    open_model(here / "store", DEMO)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["{demo}", "--precision", "int4"], 2, "precision is 'int4', not one of bf16, fp8"),
        (["{demo}", "--model", "t2v-a14c"], 2, "Did you mean 't2v-a14b'?"),
        (["nowhere"], 4, "nowhere"),
        (["{empty}"], 4, "empty"),
        (["{demo}", "--vae", "nowhere.pth"], 4, "nowhere.pth"),
        (["{demo}", "--lora", "nowhere.safetensors:0.5"], 4, "nowhere.safetensors is not there"),
        (["{demo}", "--lora-high", "x"], 2, "has one transformer, not two experts"),
        (["{demo}", "--output", "{empty}/.."], 2, "is not a store"),
    ],
)
def test_what_cannot_be_is_refused_without_torch(
    arguments: list[str], exit_code: int, message: str, here: Path, random_demo_dir: Path
) -> None:
    (here / "full").mkdir()
    (here / "full/empty").mkdir()
    places = {"demo": random_demo_dir, "empty": here / "full/empty"}
    script = "import sys; sys.modules['torch'] = None; from wanfit.cli import main; main()"
    ended = subprocess.run(
        [
            *(sys.executable, "-c", script, "convert", "--output", "store"),
            *(argument.format(**places) for argument in arguments),
        ],
        cwd=here, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert message in only_error(ended, exit_code)
    assert [path.name for path in here.iterdir()] == ["full"]


def test_the_wrong_model_is_named(here: Path, random_demo_dir: Path) -> None:
    ended = wanfit(here, "convert", str(random_demo_dir), "--output", "store", "--model", "ti2v-5b")
    line = only_error(ended, 4)
    assert "ti2v-5b" in line
    assert "demo" in line
    assert list(here.iterdir()) == []


def test_a_source_cut_short_is_refused(here: Path, random_demo_dir: Path) -> None:
    source = Path(shutil.copytree(random_demo_dir, here.parent / "cut"))
    file = source / "transformer/diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    ended = wanfit(here, "convert", str(source), "--output", "store")
    assert "is truncated" in only_error(ended, 4)
    assert list(here.iterdir()) == []
