"""A pull that dies at any point, in a process of its own: the next one goes on, and it is right."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_official
from tests.engine.tiny_models import TINY_T2V
from tests.hub_server import Fault, HubServer, Repo, hub_server, wait_until
from tests.pull.children import start
from tests.pull.test_pull import NAME, SHARD, contents, converted

SPEC = TINY_T2V.name


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HubServer]:
    """A hub with the official repository of the tiny T2V, for children."""
    write_official(tmp_path / "repo", TINY_T2V)
    with hub_server() as server:
        server.repos[NAME] = Repo(tmp_path / "repo")
        yield server


def asked_bytes(hub: HubServer) -> int:
    """Of weights, without the surveys."""
    return sum(
        seen.range_bytes or 0
        for seen in hub.seen
        if seen.where == "content" and (seen.range_bytes or 0) <= 4096
    )


def nothing_but_a_store(tmp_path: Path) -> bool:
    """No file of the repository and no scrap of work is left."""
    cache = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    return not cache and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
def test_killed_in_the_middle_of_a_shard(served: HubServer, tmp_path: Path, lean: bool) -> None:
    """While the server is silent. The second run asks for the rest alone."""
    target = tmp_path / "store"
    size = (tmp_path / "repo" / SHARD).stat().st_size
    segments = -(-size // 4096)
    served.fail(SHARD, Fault("content", stall_after_bytes=100, from_byte=3 * 4096, times=None))
    child = start(served, target, SPEC, repository=NAME, lean=lean)
    etag = served.repos[NAME].etag(SHARD)
    unfinished = tmp_path / f"hf/hub/models--wan--model/blobs/{etag}.wanfit.incomplete"
    wait_until(lambda: served.stalled.is_set() and unfinished.exists() and
               unfinished.stat().st_size == 3 * 4096)  # fmt: skip
    os.kill(child.process.pid, signal.SIGKILL)
    child.killed()
    assert not target.exists()
    assert unfinished.stat().st_size == 3 * 4096
    served.heal()
    served.seen.clear()
    start(served, target, SPEC, repository=NAME, lean=lean).finish()
    assert contents(target) == converted(tmp_path / "repo", TINY_T2V)
    assert nothing_but_a_store(tmp_path)
    assert len(served.sent(SHARD)) == 1 + segments - 3  # its header, and what was missing


KILLS = {
    "first file": (False, ("download", "VAE", 1)),
    "last file": (False, ("download", "low_noise", 2)),
    "begin of conversion": (False, ("convert", "umt5", 1)),
    "middle of conversion": (False, ("convert", "low_noise", 20)),
    "end of conversion": (False, ("convert", "vae", 60)),
    "lean, first file": (True, ("pull", "VAE", 1)),
    "lean, an expert": (True, ("pull", "high_noise_model/diffusion_pytorch_model-00002", 3)),
    "lean, checksums": (True, ("check", "low_noise", 2)),
}


@pytest.mark.parametrize("name", KILLS)
def test_killed_anywhere(served: HubServer, tmp_path: Path, name: str) -> None:
    """Twice at the same point, then left alone."""
    lean, kill = KILLS[name]
    target = tmp_path / "store"
    start(served, target, SPEC, kill=kill, repository=NAME, lean=lean, precision="fp8").killed()
    assert not target.exists()
    report = start(served, target, SPEC, repository=NAME, lean=lean, precision="fp8").finish()
    assert contents(target) == converted(tmp_path / "repo", TINY_T2V, "fp8")
    assert nothing_but_a_store(tmp_path)
    assert report["downloaded_bytes"] <= report["original_bytes"]
    if kill[0] in ("convert", "check"):
        assert report["downloaded_bytes"] <= (0 if not lean else 60_000)


def test_killed_between_the_store_and_the_tidying_up(served: HubServer, tmp_path: Path) -> None:
    """The next run finds the store whole, and takes away what was brought for it."""
    target = tmp_path / "store"
    start(served, target, SPEC, kill=("convert", "vae", 1), repository=NAME).killed()
    start(served, target, SPEC, repository=NAME, keep_original=True).finish()
    brought = {f"{'c' * 40}/{path.relative_to(tmp_path / 'repo').as_posix()}":
               served.repos[NAME].etag(path.relative_to(tmp_path / "repo").as_posix())
               for path in (tmp_path / "repo").rglob("*") if path.is_file()}  # fmt: skip
    record = {"repository": "models--wan--model", "brought": brought}
    (tmp_path / ".store.pull.json").write_text(json.dumps(record))
    served.seen.clear()
    report = start(served, target, SPEC, repository=NAME).finish()
    assert report["already_there"]
    assert served.seen == []
    assert nothing_but_a_store(tmp_path)


def test_two_pulls_of_one_model_at_once(served: HubServer, tmp_path: Path) -> None:
    """The second says that the first is at it; the first is not disturbed."""
    target = tmp_path / "store"
    served.fail(SHARD, Fault("content", stall_after_bytes=0, from_byte=4096, times=None))
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    first = start(served, target, SPEC, repository=NAME, environment=patient)
    wait_until(served.stalled.is_set)
    (tmp_path / "other").mkdir()
    second = start(
        served, tmp_path / "other" / "store", SPEC, repository=NAME,
        environment={"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    answer = second.finish()
    assert answer["error"] == "bad_output"
    assert "downloaded by another process" in answer["message"]
    served.heal()
    served.woken.set()
    first.finish()
    assert contents(target) == converted(tmp_path / "repo", TINY_T2V)


def test_the_environment_is_heard(served: HubServer, tmp_path: Path) -> None:
    """HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, as a process has them."""
    target = tmp_path / "store"
    served.repos[NAME].token, served.repos[NAME].gated = "hf_right", True
    refused = start(served, target, SPEC, repository=NAME).finish()
    assert refused["error"] == "no_access"
    wrong = {"HF_TOKEN": "hf_wrong"}
    refused = start(served, target, SPEC, repository=NAME, environment=wrong).finish()
    assert refused["error"] == "no_access"
    assert "hf_wrong" not in refused["message"]
    offline = {"HF_HUB_OFFLINE": "1"}
    refused = start(served, target, SPEC, repository=NAME, environment=offline).finish()
    assert refused["error"] == "hub_failed"
    right = {"HF_TOKEN": "hf_right", "HF_HUB_DISABLE_XET": "1"}
    kept = start(
        served, target, SPEC, repository=NAME, environment=right, keep_original=True
    ).finish()
    assert kept["originals"].startswith(str(tmp_path / "hf" / "hub"))
    served.seen.clear()
    again = start(
        served, tmp_path / "fp8", SPEC, repository=NAME, environment=offline, precision="fp8"
    ).finish()
    assert again["downloaded_bytes"] == 0
    assert served.seen == []
