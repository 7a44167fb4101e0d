"""`wanfit pull` as a person meets it: a real process, a hub on loopback, exit codes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Fault, HubServer, Repo, hub_server, wait_until
from tests.test_cli import PATIENCE_S, WANFIT, here, only_error, wanfit
from wanfit.engine.weights.store import open_store
from wanfit.specs import DEMO

__all__ = ["here"]  # a fixture
NAME = "wan/demo"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def demo_hub(random_demo_dir: Path) -> Iterator[HubServer]:
    """The demo model, in diffusers' layout, on a hub."""
    with hub_server(wan__demo=Repo(random_demo_dir)) as server:
        yield server


def environment(hub: HubServer, here: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(here.with_name("hf"))
    return clean | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, **more}


def pull(
    hub: HubServer, here: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    env = environment(hub, here, **more)
    return wanfit(here, "pull", "demo", "--repo", NAME, *arguments, env=env)


@pytest.mark.parametrize("lean", [[], ["--lean"]], ids=["whole", "lean"])
def test_it_prints_the_path_and_says_the_rest_on_stderr(
    demo_hub: HubServer, here: Path, lean: list[str]
) -> None:
    ended = pull(demo_hub, here, "--output", "store", "--precision", "fp8", *lean)
    assert ended.returncode == 0, ended
    assert ended.stdout == f"{here / 'store'}\n"
    assert open_store(here / "store", DEMO).precision == "fp8"
    assert "GB" in ended.stderr
    assert os.listdir(here) == ["store"]
    again = pull(demo_hub, here, "--output", "store", "--precision", "fp8")
    assert "was there already" in again.stderr


def test_json_is_the_report_and_nothing_else(demo_hub: HubServer, here: Path) -> None:
    ended = pull(demo_hub, here, "--output", "store", "--keep-original", "--json")
    report = json.loads(ended.stdout)
    assert report["repository"] == NAME
    assert report["commit"] == "c" * 40
    assert report["downloaded_bytes"] <= report["original_bytes"]
    assert (Path(report["originals"]) / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("arguments", "fault", "exit_code", "words"),
    [
        (["--revision", "v9"], None, 6, "no revision 'v9'"),
        (["--precision", "int4"], None, 2, "precision is 'int4'"),
        (["--lean", "--keep-original"], None, 2, "--lean"),
        ([], Fault("list", status=401, times=None), 6, "HF_TOKEN"),
        ([], Fault("list", status=404, code="RepoNotFound", times=None), 6, NAME),
    ],
)
def test_a_refusal_is_one_line_and_an_exit_code(
    demo_hub: HubServer, here: Path, arguments: list[str], fault: Fault | None,
    exit_code: int, words: str,
) -> None:  # fmt: skip
    if fault:
        demo_hub.fail("", fault)
    ended = pull(demo_hub, here, "--output", "store", *arguments)
    assert words in only_error(ended, exit_code)
    assert os.listdir(here) == []


def test_ctrl_c_ends_it_and_the_same_command_goes_on(demo_hub: HubServer, here: Path) -> None:
    """While the server is silent: one line, exit code 5, and what came is kept."""
    demo_hub.fail(WEIGHTS, Fault("content", stall_after_bytes=1 << 20, from_byte=1, times=None))
    demo_hub.fail(WEIGHTS, Fault("content", stall_after_bytes=1 << 20, times=None))
    process = subprocess.Popen(
        [*WANFIT, "pull", "demo", "--repo", NAME, "--output", "store"],
        cwd=here,
        env=environment(demo_hub, here, HF_HUB_DOWNLOAD_TIMEOUT="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(demo_hub.stalled.is_set)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 5, err
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert not (here / "store").exists()
    demo_hub.heal()
    demo_hub.woken.set()
    assert pull(demo_hub, here, "--output", "store").returncode == 0
    assert open_store(here / "store", DEMO).precision == "bf16"
    assert os.listdir(here) == ["store"]
