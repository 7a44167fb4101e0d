"""The hub's cache on this disk, shared with every other program; and whether disks have room."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from tests.hub_server import HubServer, Repo
from wanfit.errors import HubFailed
from wanfit.pull import disk
from wanfit.pull.cache import HubCache
from wanfit.pull.disk import Need, lacking
from wanfit.pull.hub import RemoteFile, Repository
from wanfit.pull.transfer import list_files, unfinished

NAME = "wan/model"
CONTENTS = {
    "a.safetensors": random.Random(1).randbytes(100_000),
    "deep/er/b.safetensors": random.Random(2).randbytes(70_000),
    "deep/config.json": b"{}",
}


@pytest.fixture
def folder(hub: HubServer, tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(content)
    hub.repos[NAME] = Repo(tmp_path / "repo")
    return tmp_path / "repo"


class Here:
    """A cache as one run of a pull has it."""

    def __init__(self, tmp_path: Path) -> None:
        self.record = tmp_path / ".store.pull.json"
        self.repository = Repository(NAME)
        self.cache = HubCache(self.repository, self.record)
        self.files = list_files(self.repository)

    def bring_all(self) -> None:
        for file in self.files.values():
            self.cache.bring(file)


def test_what_we_bring_is_found_by_the_hubs_own_library_and_the_other_way_round(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_hub_download(NAME, "a.safetensors")
    here = Here(tmp_path)
    assert here.cache.missing_bytes(here.files["a.safetensors"]) == 0
    here.bring_all()
    assert here.cache.downloaded_bytes == sum(map(len, CONTENTS.values())) - 100_000
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, content in CONTENTS.items():
        assert Path(hf_hub_download(NAME, name)).read_bytes() == content
        assert try_to_load_from_cache(NAME, name, revision="main") is not None


def test_what_was_there_before_stays_and_what_we_brought_goes(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    before = Path(hf_hub_download(NAME, "a.safetensors"))
    here = Here(tmp_path)
    here.bring_all()
    assert json.loads(here.record.read_text())["brought"].keys() == {
        f"{'c' * 40}/deep/config.json",
        f"{'c' * 40}/deep/er/b.safetensors",
    }
    again = Here(tmp_path).cache  # another run, after a kill
    again.remove_all()
    assert before.read_bytes() == CONTENTS["a.safetensors"]
    assert os.listdir(again.snapshot) == ["a.safetensors"]
    assert len(os.listdir(again.folder / "blobs")) == 1
    assert not here.record.exists()


def test_nothing_is_left_of_a_repository_that_we_alone_brought(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    here = Here(tmp_path)
    here.bring_all()
    here.cache.remove_all()
    assert not here.cache.folder.exists()


def test_a_content_that_another_snapshot_has_stays(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    """A later commit with the same file links to the same bytes."""
    here = Here(tmp_path)
    here.bring_all()
    hub.repos[NAME].commit = "d" * 40
    other = Path(hf_hub_download(NAME, "a.safetensors"))
    here.cache.remove_all()
    assert other.read_bytes() == CONTENTS["a.safetensors"]


def test_an_unfinished_file_goes_too(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    here = Here(tmp_path)
    file = here.files["a.safetensors"]
    here.cache.bring(file)
    blob = here.cache.folder / "blobs" / file.etag
    os.replace(blob, unfinished(blob))
    os.truncate(unfinished(blob), 1000)
    assert here.cache.missing_bytes(file) == 99_000
    here.cache.remove_all()
    assert not here.cache.folder.exists()


def test_a_file_of_another_length_is_not_taken_for_it(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    path = Path(hf_hub_download(NAME, "a.safetensors"))
    os.truncate(path.resolve(), 10)
    here = Here(tmp_path)
    assert here.cache.missing_bytes(here.files["a.safetensors"]) == 100_000
    here.bring_all()
    assert path.read_bytes() == CONTENTS["a.safetensors"]


def test_what_is_kept_is_ours_no_more(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.bring_all()
    here.cache.keep_all()
    Here(tmp_path).cache.remove_all()
    assert (here.cache.snapshot / "a.safetensors").read_bytes() == CONTENTS["a.safetensors"]


def test_a_record_that_somebody_wrote_removes_nothing_elsewhere(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "cache" / "victim"
    victim.parent.mkdir()
    victim.write_text("keep me")
    for brought in (
        {"../../../victim": "a" * 64},
        {str(victim): "a" * 64},
        {f"{'c' * 40}/x": "../../../victim"},
        {f"{'c' * 40}/x": 3},
        [str(victim)],
    ):
        record = {"repository": "models--wan--model", "brought": brought}
        (tmp_path / ".store.pull.json").write_text(json.dumps(record))
        Here(tmp_path).cache.remove_all()
        assert victim.read_text() == "keep me"


def test_without_links_files_have_their_names(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network volume that has no symbolic links."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    here = Here(tmp_path)
    here.bring_all()
    found = here.cache.find(here.files["a.safetensors"])
    assert found is not None
    assert found.read_bytes() == CONTENTS["a.safetensors"]
    assert not found.is_symlink()
    here.cache.remove_all()
    assert not here.cache.folder.exists()


def test_offline_the_cache_is_the_list(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Here(tmp_path)
    online.bring_all()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", "c" * 40):
        repository = Repository(NAME, revision)
        cache = HubCache(repository, tmp_path / "record")
        files = cache.list_files()
        assert files.keys() == online.files.keys()
        assert {file.etag for file in files.values()} == {
            file.etag for file in online.files.values()
        }
        assert repository.commit == "c" * 40
        for file in files.values():
            assert cache.missing_bytes(file) == 0
    for repository in (Repository(NAME, "v2"), Repository("wan/other"), Repository(NAME, "../x")):
        with pytest.raises(HubFailed, match="HF_HUB_OFFLINE is set"):
            HubCache(repository, tmp_path / "record").list_files()
    missing = RemoteFile("not/here.safetensors", 5, "a" * 64, "b" * 40)
    with pytest.raises(HubFailed, match=r"HF_HUB_OFFLINE is set, and not/here\.safetensors"):
        online.cache.bring(missing)


def test_a_disk_is_asked_once_for_what_lies_on_it_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    needs = (
        Need(tmp_path / "cache" / "hub", "download", free_bytes // 2),
        Need(tmp_path / "store", "store", free_bytes // 4),
    )
    assert not lacking(*needs)
    monkeypatch.setattr(disk, "free_bytes_of", lambda _: free_bytes // 2)
    text = lacking(*needs)
    assert f"({free_bytes // 2 + free_bytes // 4} bytes)" in text
    assert f"free ({free_bytes // 2} bytes)" in text
    assert str(tmp_path / "cache" / "hub") in text
    assert str(tmp_path / "store") in text


def test_two_disks_are_asked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too much for one is said of that one, whatever the other has."""
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    small = tmp_path / "small"
    monkeypatch.setattr(disk, "device_of", lambda folder: folder.name)
    monkeypatch.setattr(disk, "free_bytes_of", lambda folder: 100 if folder == small else 1000)
    download = Need(tmp_path / "small", "download", 101)
    store = Need(tmp_path / "large", "store", 1000)
    assert lacking(download, store).startswith("The download needs 0.00 GB in")
    assert "(101 bytes)" in lacking(download, store)
    assert not lacking(Need(tmp_path / "small", "download", 100), store)
