"""From a hub to a store: the bytes that `wanfit convert` makes of the same files, or nothing."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from tests.checkpoints import write_diffusers, write_official
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V
from tests.hub_server import Fault, HubServer, Repo
from wanfit.engine.weights.checkpoint import choose, open_parts
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.store import open_store
from wanfit.errors import (
    BadDownload,
    BadOption,
    BadOutput,
    DiskFull,
    HubFailed,
    NotOnHub,
    WeightsError,
)
from wanfit.plan.plan import Precision
from wanfit.pull import PullStep, disk, pull_model
from wanfit.pull.layout import WEIGHT_SUFFIXES
from wanfit.specs import DEMO, ModelSpec

NAME = "wan/model"
SHARD = "high_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors"
SPECS = {spec.name: spec for spec in (TINY_T2V, TINY_I2V, TINY_TI2V)}


@pytest.fixture
def repo(hub: HubServer, tmp_path: Path) -> Path:
    """An official repository of the tiny T2V, on the hub."""
    return official(hub, tmp_path, TINY_T2V)


def official(hub: HubServer, tmp_path: Path, spec: ModelSpec) -> Path:
    write_official(tmp_path / "repo", spec)
    (tmp_path / "repo" / "README.md").write_text("not a weight")
    hub.repos[NAME] = Repo(tmp_path / "repo")
    return tmp_path / "repo"


def converted(repo: Path, spec: ModelSpec, precision: Precision = "bf16") -> dict[str, bytes]:
    """What `wanfit convert` makes of the repository's files."""
    target = repo.with_name(f"converted-{precision}")
    convert_model(open_parts(choose(repo, spec)), target, precision)
    return contents(target)


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def left_over(tmp_path: Path) -> list[str]:
    """What a pull may leave: in the cache, and beside its target."""
    cache = [str(path) for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    beside = [path.name for path in tmp_path.glob(".*")]
    return [name for name in cache if not name.endswith("CACHEDIR.TAG")] + beside


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", SPECS)
def test_a_pulled_store_is_the_converted_one_and_nothing_else_is_left(
    hub: HubServer, tmp_path: Path, name: str, precision: Precision, lean: bool
) -> None:
    spec = SPECS[name]
    repo = official(hub, tmp_path, spec)
    steps: list[PullStep] = []
    report = pull_model(
        spec, tmp_path / "store", precision, repository=NAME, lean=lean, on_step=steps.append
    )
    assert contents(tmp_path / "store") == converted(repo, spec, precision)
    assert left_over(tmp_path) == []
    files = {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()}
    del files[repo / "README.md"]
    assert report.original_bytes == sum(map(len, files.values()))
    # Both experts have the same config.json, and often the same index.
    assert report.downloaded_bytes == sum(map(len, set(files.values())))
    assert report.store_bytes == sum(map(len, contents(tmp_path / "store").values()))
    assert (report.commit, report.already_there, report.originals) == ("c" * 40, False, None)
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases == (["pull", "check"] if lean else ["download", "convert"])
    for phase in phases:
        done = [step.done_bytes for step in steps if step.phase == phase]
        assert done == sorted(done)
        assert done[-1] == [step.total_bytes for step in steps if step.phase == phase][-1]


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
def test_a_diffusers_repository_serves_too(hub: HubServer, tmp_path: Path, lean: bool) -> None:
    write_diffusers(tmp_path / "repo", TINY_T2V, num_shards=2)
    hub.repos[NAME] = Repo(tmp_path / "repo")
    pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=lean)
    assert contents(tmp_path / "store") == converted(tmp_path / "repo", TINY_T2V)


def test_a_lean_pull_has_one_shard_on_the_disk_at_a_time(
    hub: HubServer, tmp_path: Path, repo: Path
) -> None:
    """Seen at every step: weights in the cache, whole or not; and at the end none was left out."""
    weights = {hub.repos[NAME].etag(path.relative_to(repo).as_posix()): path.name
               for path in repo.rglob("*") if path.name.endswith(WEIGHT_SUFFIXES)}  # fmt: skip
    seen: set[str] = set()

    def on_step(step: PullStep) -> None:
        blobs = tmp_path / "cache" / "models--wan--model" / "blobs"
        here = {name.partition(".")[0] for name in os.listdir(blobs)} & weights.keys()
        assert len(here) <= 1, here
        seen.update(here)

    pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=True, on_step=on_step)
    assert seen == weights.keys()


def test_what_is_kept_is_not_fetched_again(hub: HubServer, tmp_path: Path, repo: Path) -> None:
    first = pull_model(TINY_T2V, tmp_path / "a", repository=NAME, keep_original=True)
    assert first.originals is not None
    assert (first.originals / SHARD).read_bytes() == (repo / SHARD).read_bytes()
    for lean in (False, True):
        target = tmp_path / f"fp8-{lean}"
        second = pull_model(TINY_T2V, target, "fp8", repository=NAME, lean=lean)
        assert second.downloaded_bytes == 0
        assert contents(target) == converted(repo, TINY_T2V, "fp8")
        shutil.rmtree(repo.with_name("converted-fp8"))
    assert (first.originals / SHARD).read_bytes() == (repo / SHARD).read_bytes()


def test_a_cache_is_used_offline_and_stays(
    hub: HubServer, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hf download` fills it."""
    there = Path(snapshot_download(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    assert contents(tmp_path / "store") == converted(repo, TINY_T2V)
    assert hub.seen == []
    assert (there / SHARD).read_bytes() == (repo / SHARD).read_bytes()
    (there / SHARD).unlink()
    with pytest.raises(NotOnHub, match="00002-of-00002"):
        pull_model(TINY_T2V, tmp_path / "again", repository=NAME)
    with pytest.raises(HubFailed, match="HF_HUB_OFFLINE is set"):
        pull_model(TINY_T2V, tmp_path / "again", repository="wan/other")


def test_a_store_that_is_there_costs_no_request(hub: HubServer, tmp_path: Path, repo: Path) -> None:
    pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    before = contents(tmp_path / "store")
    hub.seen.clear()
    report = pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    assert report.already_there
    assert report.downloaded_bytes == 0
    assert hub.seen == []
    assert contents(tmp_path / "store") == before


def test_a_store_of_another_precision_or_a_broken_one_is_replaced(
    hub: HubServer, tmp_path: Path, repo: Path
) -> None:
    store = tmp_path / "store"
    pull_model(TINY_T2V, store, repository=NAME)
    pull_model(TINY_T2V, store, "fp8", repository=NAME)
    assert contents(store) == converted(repo, TINY_T2V, "fp8")
    os.truncate(store / "vae.safetensors", 100)
    assert not pull_model(TINY_T2V, store, "fp8", repository=NAME).already_there
    assert open_store(store, TINY_T2V).precision == "fp8"


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
def test_too_small_a_disk_is_said_before_a_weight_comes(
    hub: HubServer, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, lean: bool
) -> None:
    """With both numbers. Where one shard at a time would fit, the hint says so."""
    weights = [path for path in repo.rglob("*") if path.name.endswith(WEIGHT_SUFFIXES)]
    sizes = [path.stat().st_size for path in weights]
    store = sum(len(c) for name, c in converted(repo, TINY_T2V).items() if "safe" in name)
    lean_bytes, whole_bytes = store + max(sizes), store + sum(sizes)
    monkeypatch.setattr(disk, "free_bytes_of", lambda _: lean_bytes - (1 if lean else 0))
    with pytest.raises(DiskFull) as error:
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=lean)
    assert f"({lean_bytes if lean else whole_bytes} bytes)" in str(error.value)
    assert f"free ({lean_bytes - lean} bytes)" in str(error.value)
    assert ("--lean needs" in error.value.hint) == (not lean)
    assert not (tmp_path / "store").exists()
    largest = max(weights, key=lambda path: path.stat().st_size)
    incomplete = list((tmp_path / "cache").rglob("*.incomplete"))
    assert incomplete == []
    assert not list((tmp_path / "cache").rglob(largest.name))


def test_a_disk_that_fills_while_a_file_comes_is_named(
    hub: HubServer, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's disk, whatever the other has; and the next run goes on."""
    real_write, count = os.write, 0

    def full(handle: int, content: bytes) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(28, "No space left on device")
        return real_write(handle, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match=f"{tmp_path / 'cache'} is full"):
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    monkeypatch.undo()
    assert not (tmp_path / "store").exists()


def test_another_models_repository_is_said_before_a_weight_comes(
    hub: HubServer, tmp_path: Path, repo: Path
) -> None:
    """By the headers; and the message has the repository's name, not a place of ours."""
    with pytest.raises(WeightsError) as error:
        pull_model(TINY_I2V, tmp_path / "store", repository=NAME)
    assert NAME in str(error.value)
    assert "/tmp/" not in str(error.value).replace(str(tmp_path), "")
    assert not (tmp_path / "store").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
def test_a_file_with_other_bytes_makes_no_store(
    hub: HubServer, tmp_path: Path, repo: Path, lean: bool
) -> None:
    wrong = tmp_path / "wrong"
    content = bytearray((repo / SHARD).read_bytes())
    content[-1] ^= 1
    wrong.write_bytes(content)
    hub.fail(SHARD, Fault("content", file=wrong, times=None))
    with pytest.raises(BadDownload, match="checksum"):
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=lean)
    assert not (tmp_path / "store").exists()
    etag = hub.repos[NAME].etag(SHARD)
    assert not [name for name in left_over(tmp_path) if etag in name]
    hub.heal()
    hub.seen.clear()
    pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=lean)
    assert contents(tmp_path / "store") == converted(repo, TINY_T2V)
    assert left_over(tmp_path) == []


def test_a_repository_that_changes_between_two_runs(
    hub: HubServer, tmp_path: Path, repo: Path
) -> None:
    """The commit is pinned at the list; a later run takes the later one, and removes both."""
    hub.fail("Wan2.1_VAE.pth", Fault("content"))
    hub.fail("Wan2.1_VAE.pth", Fault("content", status=418, times=None))
    with pytest.raises(HubFailed):
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    hub.heal()
    shutil.rmtree(repo)
    write_official(repo, TINY_T2V, num_shards=3)
    hub.repos[NAME] = Repo(repo, commit="d" * 40)
    report = pull_model(TINY_T2V, tmp_path / "store", repository=NAME)
    assert report.commit == "d" * 40
    assert contents(tmp_path / "store") == converted(repo, TINY_T2V)
    assert left_over(tmp_path) == []


def test_options_that_cannot_be(hub: HubServer, tmp_path: Path, repo: Path) -> None:
    with pytest.raises(BadOption, match="keeps no file"):
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME, lean=True, keep_original=True)
    with pytest.raises(BadOption, match="in no repository"):
        pull_model(DEMO, tmp_path / "store")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(BadOutput, match="is not a store"):
        pull_model(TINY_T2V, tmp_path / "taken", repository=NAME)
    with pytest.raises(BadOutput, match=re.escape(str(tmp_path / "taken" / "file" / "store"))):
        pull_model(TINY_T2V, tmp_path / "taken" / "file" / "store", repository=NAME)
    with pytest.raises(NotOnHub, match="no revision 'v2'"):
        pull_model(TINY_T2V, tmp_path / "store", repository=NAME, revision="v2")
    assert left_over(tmp_path) == []
