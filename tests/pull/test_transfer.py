"""One file from the hub: whatever happens on the way, it comes right or not at all."""

from __future__ import annotations

import os
import random
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from tests.hub_server import Fault, HubServer, Repo
from wanfit.errors import (
    BadDownload,
    BadOption,
    BadOutput,
    DownloadFailed,
    HubFailed,
    NoAccess,
    NotOnHub,
)
from wanfit.pull import transfer
from wanfit.pull.hub import RemoteFile, Repository
from wanfit.pull.transfer import download, list_files, unfinished

NAME, LARGE, SMALL = "wan/model", "part/weights.safetensors", "config.json"
CONTENT = random.Random(0).randbytes(300_000)  # five segments, the last one short
TOKEN = "hf_S3cretS3cretS3cret"


@pytest.fixture
def repo(hub: HubServer, tmp_path: Path) -> Repo:
    folder = tmp_path / "repo"
    (folder / "part").mkdir(parents=True)
    (folder / LARGE).write_bytes(CONTENT)
    (folder / SMALL).write_text('{"small": true}')
    hub.repos[NAME] = Repo(folder)
    return hub.repos[NAME]


def bring(path: Path, name: str = LARGE, **options: str) -> list[int]:
    """Lists and downloads; what was told of the bytes that came."""
    repository = Repository(NAME, **options)
    came: list[int] = []
    download(repository, list_files(repository)[name], path, came.append)
    return came


def left_over(path: Path) -> list[str]:
    """Names beside `path`, and `path` itself, that are there."""
    return sorted(os.listdir(path.parent)) if path.parent.exists() else []


def test_the_server_is_a_hub_for_the_hubs_own_library(repo: Repo, tmp_path: Path) -> None:
    """What huggingface_hub downloads by itself is what we download, under the same ETag."""
    for name in (LARGE, SMALL):
        theirs = Path(hf_hub_download(NAME, name))
        bring(tmp_path / "ours" / name, name)
        assert theirs.read_bytes() == (tmp_path / "ours" / name).read_bytes()
        repository = Repository(NAME)
        assert theirs.resolve().name == list_files(repository)[name].etag
        assert repository.commit == theirs.parts[theirs.parts.index("snapshots") + 1]


def test_a_file_comes_whole_in_ranges(repo: Repo, hub: HubServer, tmp_path: Path) -> None:
    came = bring(tmp_path / "out" / "file")
    assert (tmp_path / "out" / "file").read_bytes() == CONTENT
    assert left_over(tmp_path / "out" / "file") == ["file"]
    assert sum(came) == len(CONTENT)
    asked = [seen.range_bytes for seen in hub.sent(LARGE)]
    assert sorted(filter(None, asked)) == [300_000 - 4 * 65536, *[65536] * 4]


def test_a_cut_connection_continues_where_it_was_cut(
    repo: Repo, hub: HubServer, tmp_path: Path
) -> None:
    """Each byte comes once: the next request asks for the rest alone."""
    hub.fail(LARGE, Fault("content", cut_after_bytes=10_000, times=3))
    came = bring(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert sum(came) == len(CONTENT)
    assert len(hub.sent(LARGE)) == 5 + 3
    starts = [
        int(seen.range.removeprefix("bytes=").split("-")[0])
        for seen in hub.sent(LARGE)
        if seen.range
    ]
    assert sum(start % 65536 == 10_000 for start in starts) == 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault("content", status=503, times=4),
        Fault("content", status=500, times=2),
        Fault("content", status=429, headers={"Retry-After": "0"}, times=4),
        Fault("resolve", status=503, times=3),
        Fault("list", status=502, times=5),
        Fault("list", status=429, headers={"ratelimit": '"api";r=0;t=0'}, times=2),
        Fault("content", cut_after_bytes=0, times=2),
        Fault("content", stall_after_bytes=5_000, times=1),
    ],
    ids=lambda fault: f"{fault.where}-{fault.status or 'connection'}",
)
def test_what_passes_by_itself_is_waited_for(
    repo: Repo, hub: HubServer, tmp_path: Path, fault: Fault
) -> None:
    hub.fail("" if fault.where == "list" else LARGE, fault)
    bring(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("content", status=503, times=None), "503"),
        (Fault("content", status=429, times=None), "asked too often (429)"),
        (
            Fault("content", status=429, times=None, headers={"Retry-After": "3600"}),
            "wait 3600 s",
        ),
        (Fault("resolve", status=500, times=None), "500"),
        (Fault("content", cut_after_bytes=0, times=None), "broke"),
        (Fault("content", stall_after_bytes=0, times=None), "1 s without a byte"),
        (Fault("content", status=418, times=None), "418"),
        (Fault("content", ignore_range=True, times=None), "only as a whole"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_does_not_pass_is_one_error_and_no_file(
    repo: Repo, hub: HubServer, tmp_path: Path, fault: Fault, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfer, "TRIES", 2)
    hub.fail(LARGE, fault)
    with pytest.raises(HubFailed) as error:
        bring(tmp_path / "out" / "file")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert left_over(tmp_path / "out" / "file") == []


def test_an_address_whose_signature_ran_out_is_asked_for_again(
    repo: Repo, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked once where a file is, and again when that place refuses."""
    monkeypatch.setattr(transfer, "CONNECTIONS", 1)
    for _ in range(2):
        hub.fail(LARGE, Fault("content"))  # nothing goes wrong
    hub.fail(LARGE, Fault("content", status=403))
    bring(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(hub.sent(LARGE)) == 5 + 1
    assert sum(seen.where == "resolve" for seen in hub.seen) == 2


def test_drops_do_not_count_as_progress(
    repo: Repo, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a connection that always breaks after a few bytes would be tried for ever."""
    monkeypatch.setattr(transfer, "CONNECTIONS", 1)
    hub.fail(LARGE, Fault("content", cut_after_bytes=100, times=None))
    with pytest.raises(HubFailed, match=f"did not come in {transfer.TRIES} tries"):
        bring(tmp_path / "file")
    assert len(hub.sent(LARGE)) == transfer.TRIES
    hub.heal()
    hub.fail(LARGE, Fault("content", cut_after_bytes=9000, times=None))
    bring(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(hub.sent(LARGE)) > 2 * transfer.TRIES


def test_what_came_before_a_failure_is_kept_and_not_fetched_again(
    repo: Repo, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    monkeypatch.setattr(transfer, "CONNECTIONS", 1)
    path = tmp_path / "out" / "file"
    for _ in range(2):  # two segments come whole, the third never
        hub.fail(LARGE, Fault("content"))
    hub.fail(LARGE, Fault("content", status=503, times=None))
    with pytest.raises(HubFailed, match="continues where it stopped"):
        bring(path)
    assert left_over(path) == ["file.wanfit.incomplete"]
    assert unfinished(path).read_bytes() == CONTENT[: 2 * 65536]
    hub.heal()
    hub.seen.clear()
    came = bring(path)
    assert path.read_bytes() == CONTENT
    assert sum(came) == len(CONTENT) - 2 * 65536
    assert left_over(path) == ["file"]


def test_damage_in_what_was_there_is_found_and_all_of_it_fetched_again(
    repo: Repo, tmp_path: Path
) -> None:
    """As after a power cut: the checksum goes over the whole file, not over what came now."""
    path = tmp_path / "file"
    unfinished(path).write_bytes(bytes(100_000))
    came = bring(path)
    assert path.read_bytes() == CONTENT
    assert sum(came) == len(CONTENT) - 100_000


def test_too_much_of_an_unfinished_file_is_begun_anew(repo: Repo, tmp_path: Path) -> None:
    path = tmp_path / "file"
    unfinished(path).write_bytes(CONTENT + b"more")
    bring(path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("name", [LARGE, SMALL])
def test_a_wrong_checksum_is_tried_once_more_and_then_an_error(
    repo: Repo, hub: HubServer, tmp_path: Path, name: str
) -> None:
    """SHA-256 of a large file, git's SHA-1 of a small one."""
    right = (repo.folder / name).read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    path = tmp_path / "out" / "file"
    requests = -(-len(right) // transfer.SEGMENT_BYTES)
    hub.fail(name, Fault("content", file=wrong, times=requests))
    bring(path, name)
    assert path.read_bytes() == right
    path.unlink()
    hub.fail(name, Fault("content", file=wrong, times=None))
    with pytest.raises(BadDownload, match=r"came twice with the checksum .* instead of"):
        bring(path, name)
    assert left_over(path) == []


@pytest.mark.parametrize("name", [LARGE, SMALL])
@pytest.mark.parametrize("change", [-1, +1], ids=["shorter", "longer"])
def test_a_wrong_length_is_an_error_with_both_numbers(
    repo: Repo, hub: HubServer, tmp_path: Path, name: str, change: int
) -> None:
    right = (repo.folder / name).read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_bytes((right + b"x")[: len(right) + change])
    hub.fail(name, Fault("content", file=wrong, times=None))
    path = tmp_path / "out" / "file"
    with pytest.raises(BadDownload) as error:
        bring(path, name)
    assert str(len(right)) in str(error.value)
    assert left_over(path) == []


def test_refusals_say_what_to_do(hub: HubServer, repo: Repo, tmp_path: Path) -> None:
    """Of the list, and of a file."""
    cases: list[tuple[str, Fault, type[DownloadFailed], str]] = [
        ("", Fault("list", status=401), NoAccess, "HF_TOKEN"),
        ("", Fault("list", status=403), NoAccess, "HF_TOKEN"),
        ("", Fault("list", status=401, code="RepoNotFound"), NotOnHub, "no repository wan/model"),
        (LARGE, Fault("resolve", status=403, code="GatedRepo"), NoAccess, "Accept its terms"),
        (LARGE, Fault("resolve", status=404, code="EntryNotFound"), NotOnHub, LARGE),
        (LARGE, Fault("resolve", status=401), NoAccess, "HF_TOKEN"),
    ]
    for path, fault, kind, words in cases:
        hub.heal()
        fault.times = None
        hub.fail(path, fault)
        with pytest.raises(kind) as error:
            bring(tmp_path / "out" / "file")
        assert words in str(error.value)
        assert left_over(tmp_path / "out" / "file") == []


def test_an_unknown_repository_revision_or_name(hub: HubServer, repo: Repo) -> None:
    with pytest.raises(NotOnHub, match="has no repository wan/other"):
        list_files(Repository("wan/other"))
    with pytest.raises(NotOnHub, match="no revision 'v9'"):
        list_files(Repository(NAME, "v9"))
    with pytest.raises(BadOption, match="'a/b/c' is not the name of a repository"):
        list_files(Repository("a/b/c"))


def test_a_token_opens_a_gated_repository_and_goes_to_the_hub_alone(
    hub: HubServer, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.token, repo.gated = TOKEN, True
    with pytest.raises(NoAccess, match=r"gated.*\(401\)"):
        bring(tmp_path / "file")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(NoAccess, match=r"gated.*\(403\)"):
        bring(tmp_path / "file")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.seen.clear()
    bring(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    elsewhere = hub.sent(LARGE)
    assert len(elsewhere) == 5
    assert {seen.authorization for seen in elsewhere} == {None}
    assert {s.authorization for s in hub.seen if s.where != "content"} == {f"Bearer {TOKEN}"}


def test_no_error_or_log_shows_the_token_or_a_signed_address(
    hub: HubServer, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Not even the traceback of an error that is shown whole."""
    monkeypatch.setattr(transfer, "TRIES", 2)
    repo.token, repo.gated = TOKEN, True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = ""
    with caplog.at_level("DEBUG", "huggingface_hub"):
        for fault in (
            Fault("content", status=503, times=None),
            Fault("content", status=403, times=None),
            Fault("content", cut_after_bytes=9, times=None),
            Fault("resolve", status=404, code="EntryNotFound", times=None),
        ):
            hub.heal()
            hub.fail(LARGE, fault)
            with pytest.raises(DownloadFailed) as error:
                bring(tmp_path / "file")
            shown += "".join(traceback.format_exception(error.value))
    captured = capfd.readouterr()
    for text in (shown, captured.out, captured.err, caplog.text):
        assert TOKEN not in text
    assert "Signature" not in shown + captured.out + captured.err


@pytest.mark.parametrize("token", ["hf_broken\x01", "hf_ключ", "hf\x7f"])
def test_a_token_that_no_header_can_carry_is_named_but_not_shown(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(NoAccess) as error:
        Repository(NAME)
    assert token not in str(error.value)


def test_one_process_at_a_time_brings_a_file(repo: Repo, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        transfer._open_unfinished(path),
        pytest.raises(BadOutput, match="being downloaded by another process"),
    ):
        bring(path)
    bring(path)
    assert path.read_bytes() == CONTENT


def test_a_list_that_leads_out_of_the_cache_is_refused(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and checksums of a hub become paths here, so they are looked at first."""
    good = repo.listing()
    bad = [
        {"rfilename": "../../evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "/etc/evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "a/./b", "size": 1, "blobId": "0" * 40},
        {"rfilename": "a", "size": 1, "blobId": "../" + "0" * 37},
        {"rfilename": "a", "size": -1, "blobId": "0" * 40},
        {"rfilename": "a", "size": None, "blobId": "0" * 40},
        {"rfilename": "a", "size": 1, "blobId": None},
        {"rfilename": "a", "size": 1, "blobId": "0" * 40,
         "lfs": {"sha256": "../up", "size": 1, "pointerSize": 1}},
    ]  # fmt: skip
    for sibling in bad:
        monkeypatch.setattr(Repo, "listing", lambda _, sibling=sibling: [*good, sibling])
        with pytest.raises(HubFailed, match="something else than a list of files"):
            list_files(Repository(NAME))


def test_an_unreachable_hub_is_named(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubFailed, match=r"in 2 tries.*no connection to 127\.0\.0\.1"):
        list_files(Repository(NAME))


def test_the_disk_is_told_from_the_network(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file system refuses stays an OSError, for the caller that knows which disk it is."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        bring(tmp_path / "file")


def test_an_empty_file_is_a_file(hub: HubServer, repo: Repo, tmp_path: Path) -> None:
    (repo.folder / "empty.txt").touch()
    bring(tmp_path / "file", "empty.txt")
    assert (tmp_path / "file").read_bytes() == b""


def test_the_name_of_an_unfinished_file_is_its_own() -> None:
    file = RemoteFile("x", 1, "a" * 64, "b" * 40)
    assert unfinished(Path("blobs") / file.etag).name == f"{'a' * 64}.wanfit.incomplete"
