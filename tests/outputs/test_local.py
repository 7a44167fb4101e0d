"""Clips in a directory: whole or not at all, read by ranges, and gone when their time is over."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.outputs.clips import FPS, FRAMES, HEIGHT, WIDTH, everything, keep_one, write_clip
from wanfit.errors import BadOption, BadSetting, DiskFull, NotKept
from wanfit.outputs import Kept, LocalOutputs, Retention

SOON = Retention(min_free_bytes=0, min_age_s=0)
NO_JOBS: frozenset[str] = frozenset()


@pytest.fixture
def store(tmp_path: Path) -> LocalOutputs:
    return LocalOutputs(tmp_path / "clips", SOON)


class TestKeeping:
    def test_a_clip_comes_with_its_pictures_and_metadata(
        self, store: LocalOutputs, tmp_path: Path
    ) -> None:
        kept = keep_one(store)
        names = ["clip.mp4", "metadata.json", "spritesheet.jpg", "thumbnail.webp"]
        assert everything(tmp_path / "clips") == {f"{kept.key}/{name}" for name in names}
        assert (kept.width, kept.height, kept.num_frames) == (WIDTH, HEIGHT, FRAMES)
        assert (kept.fps, kept.attempt, kept.job_id) == (FPS, 1, "job")

        video = store.path(kept.key)
        assert video is not None
        assert kept.sha256 == hashlib.sha256(video.read_bytes()).hexdigest()
        assert kept.num_bytes == video.stat().st_size
        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(video=0)) == FRAMES

        thumbnail = store.path(kept.key, "thumbnail")
        assert thumbnail is not None
        with Image.open(thumbnail) as picture:
            assert (picture.format, picture.size) == ("WEBP", (WIDTH, HEIGHT))
            assert abs(np.asarray(picture).mean() - 127) < 8  # the middle frame
        sheet = store.path(kept.key, "spritesheet")
        assert sheet is not None
        with Image.open(sheet) as picture:
            assert picture.format == "JPEG"
            assert picture.width > 4 * WIDTH

    def test_the_metadata_is_enough_to_know_the_clip_without_a_database(
        self, store: LocalOutputs
    ) -> None:
        kept = keep_one(store)
        path = store.path(kept.key, "metadata")
        assert path is not None
        fields = json.loads(path.read_text("utf-8"))
        assert fields["metadata"] == {"prompt": "a fox"}
        assert Kept.from_json(json.loads(json.dumps(kept.to_json()))) == kept == store.kept("job.a")

    def test_a_file_from_elsewhere_is_copied_and_stays(
        self, store: LocalOutputs, tmp_path: Path
    ) -> None:
        write_clip(tmp_path / "other.mp4")
        kept = store.keep(tmp_path / "other.mp4", job_id="job", attempt=1, lease="a", metadata={})
        assert (tmp_path / "other.mp4").exists()
        assert kept.num_bytes == (tmp_path / "other.mp4").stat().st_size

    def test_one_lease_keeps_once_and_two_leases_never_overwrite_each_other(
        self, store: LocalOutputs
    ) -> None:
        first, again = keep_one(store), keep_one(store)
        assert first == again
        late = keep_one(store, lease="b")
        assert late.key != first.key
        assert {stored.key for stored in store.keys()} == {"job.a", "job.b"}  # noqa: SIM118

    def test_what_does_not_play_is_not_kept(self, store: LocalOutputs, tmp_path: Path) -> None:
        draft = store.draft("job", "a")
        draft.write_bytes(b"\0" * 1000)
        with pytest.raises(av.FFmpegError):
            store.keep(draft, job_id="job", attempt=1, lease="a", metadata={})
        assert everything(tmp_path) == {"clips/.work/job.a/clip.mp4"}
        store.delete("job.a")
        assert everything(tmp_path) == set()

    def test_a_draft_that_could_not_be_kept_can_be_kept_later(
        self, store: LocalOutputs, tmp_path: Path
    ) -> None:
        draft = store.draft("job", "a")
        write_clip(draft)
        with pytest.raises(TypeError, match="not JSON serializable"):
            store.keep(draft, job_id="job", attempt=1, lease="a", metadata={"x": object()})
        assert everything(tmp_path) == {"clips/.work/job.a/clip.mp4"}
        assert store.keep(draft, job_id="job", attempt=1, lease="a", metadata={}).num_bytes

    @pytest.mark.parametrize(
        "wrong",
        ["", ".", "..", "../x", "a/b", "a\\b", "a.b", "/etc", "a\0b", "a" * 101, "é", "a\n"],
    )
    def test_an_id_that_is_no_id_becomes_no_path(self, store: LocalOutputs, wrong: str) -> None:
        with pytest.raises(BadOption, match="is not an id"):
            store.draft(wrong, "a")
        with pytest.raises(BadOption, match="is not an id"):
            store.draft("job", wrong)
        assert store.path(wrong) is None
        assert store.path(f"{wrong}.a") is None
        store.delete(wrong)
        with pytest.raises(NotKept):
            store.open(wrong)

    def test_every_byte_is_on_disk_before_the_name_appears(
        self, store: LocalOutputs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The order of the system calls: files, their directory, the rename, its parent."""
        calls: list[str] = []
        real_fsync, real_rename = os.fsync, Path.rename

        def fsync(handle: int) -> None:
            calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
            real_fsync(handle)

        def rename(path: Path, target: Path) -> Path:
            calls.append(f"rename {target.name}")
            return real_rename(path, target)

        draft = store.draft("job", "a")
        write_clip(draft)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)
        store.keep(draft, job_id="job", attempt=1, lease="a", metadata={})
        files = ["clip.mp4", "metadata.json", "spritesheet.jpg", "thumbnail.webp"]
        assert sorted(calls[:4]) == [f"sync {name}" for name in files]
        assert calls[4:] == ["sync job.a", "rename job.a", "sync clips"]

    def test_a_kill_at_any_moment_leaves_a_whole_clip_or_none(self, tmp_path: Path) -> None:
        """Killed 12 times within what one keep takes; what is under its final name is whole."""
        write_clip(tmp_path / "clip.mp4")
        code = (
            "import sys; from pathlib import Path; from wanfit.outputs import LocalOutputs\n"
            "import av, PIL.WebPImagePlugin, PIL.JpegImagePlugin\n"
            "store = LocalOutputs(Path(sys.argv[1])); print('ready', flush=True)\n"
            "for i in range(10**6):\n"
            "    store.keep(Path(sys.argv[2]), job_id=f'job{i}', attempt=1, lease=sys.argv[3],"
            " metadata={})\n"
        )
        directory = tmp_path / "clips"
        killed_midway = 0
        for count in range(12):
            arguments = [directory, tmp_path / "clip.mp4", f"lease{count}"]
            with subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE
            ) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(0.02 + 0.0037 * count)
                process.kill()
            killed_midway += any((directory / ".work").iterdir())
            store = LocalOutputs(directory, SOON)
            store.clear_drafts(NO_JOBS)
            assert not any((directory / ".work").iterdir())
            for stored in store.keys():  # noqa: SIM118
                kept = store.kept(stored.key)
                for variant, file in kept.files.items():
                    data = b"".join(store.open(stored.key, variant=variant).pieces)
                    assert hashlib.sha256(data).hexdigest() == file.sha256
        assert killed_midway >= 3

    def test_a_directory_that_cannot_be_written_is_found_at_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BadSetting, match="Not a directory"):
            LocalOutputs(tmp_path / "file" / "clips")


class TestReading:
    @pytest.mark.parametrize(
        ("start", "stop", "expected"),
        [
            (0, None, slice(0, None)),
            (10, 20, slice(10, 20)),
            (5, 10**9, slice(5, None)),
            (10**9, None, slice(0, 0)),
        ],
    )
    def test_a_range_gives_just_its_bytes(
        self, store: LocalOutputs, start: int, stop: int | None, expected: slice
    ) -> None:
        kept = keep_one(store)
        path = store.path(kept.key)
        assert path is not None
        data = path.read_bytes()
        body = store.open(kept.key, start, stop)
        assert b"".join(body.pieces) == data[expected]
        assert body.whole_bytes == len(data)
        assert body.stop - body.start == len(data[expected])
        assert body.content_type == "video/mp4"

    def test_what_is_deleted_while_it_is_read_comes_to_its_end(self, store: LocalOutputs) -> None:
        kept = keep_one(store)
        body = store.open(kept.key)
        store.delete(kept.key)
        assert hashlib.sha256(b"".join(body.pieces)).hexdigest() == kept.sha256
        with pytest.raises(NotKept, match=r"'job\.a'"):
            store.open(kept.key)
        with pytest.raises(NotKept):
            store.kept(kept.key)
        store.delete(kept.key)  # once more is no error

    def test_there_is_no_address_but_the_servers(self, store: LocalOutputs) -> None:
        assert store.url(keep_one(store).key, 60) is None


class TestRetention:
    def clips(self, directory: Path, rules: Retention) -> tuple[LocalOutputs, int]:
        """Three clips, of 300, 200 and 100 seconds ago, and the bytes of one."""
        store = LocalOutputs(directory, rules)
        for age_s in (100, 300, 200):
            kept = keep_one(store, f"job{age_s}")
            path = store.path(kept.key)
            assert path is not None
            os.utime(path, (time.time() - age_s, time.time() - age_s))
        sizes = [stored.num_bytes for stored in store.keys()]  # noqa: SIM118
        assert max(sizes) - min(sizes) < 10
        return store, max(sizes)

    def left(self, store: LocalOutputs) -> set[str]:
        return {stored.job_id for stored in store.keys()}  # noqa: SIM118

    def test_by_age(self, tmp_path: Path) -> None:
        store, _ = self.clips(tmp_path, Retention(max_age_s=150, min_free_bytes=0, min_age_s=0))
        swept = store.sweep(time.time(), keep={"job200"})
        assert [clip.job_id for clip in swept.deleted] == ["job300"]
        assert self.left(store) == {"job100", "job200"}
        assert not any((tmp_path / ".trash").iterdir())

    def test_by_size_the_oldest_goes_first(self, tmp_path: Path) -> None:
        _, one = self.clips(tmp_path, SOON)
        rules = Retention(max_bytes=2 * one, min_free_bytes=0, min_age_s=0)
        store = LocalOutputs(tmp_path, rules)
        assert [clip.job_id for clip in store.sweep(time.time(), NO_JOBS).deleted] == ["job300"]
        assert store.sweep(time.time(), NO_JOBS).deleted == ()

    def test_by_the_margin_of_free_disk_but_never_a_running_or_a_young_one(
        self, tmp_path: Path
    ) -> None:
        """A margin that no deleting reaches takes all that may go."""
        rules = Retention(min_free_bytes=1 << 60, min_age_s=150)
        store, _ = self.clips(tmp_path, rules)
        swept = store.sweep(time.time(), keep={"job200"})
        assert [clip.job_id for clip in swept.deleted] == ["job300"]
        assert self.left(store) == {"job100", "job200"}
        with pytest.raises(DiskFull, match="margin"):
            store.check_room()
        LocalOutputs(tmp_path, SOON).check_room(1000)

    def test_a_clock_that_was_set_back_deletes_nothing(self, tmp_path: Path) -> None:
        store, _ = self.clips(tmp_path, Retention(max_age_s=0, min_free_bytes=1 << 60))
        assert store.sweep(time.time() - 10**6, NO_JOBS).deleted == ()

    def test_drafts_of_the_dead_go_and_those_of_running_jobs_stay(self, tmp_path: Path) -> None:
        store = LocalOutputs(tmp_path, SOON)
        for job_id in ("running", "dead", "new"):
            store.draft(job_id, "a").write_bytes(b"half")
        long_ago_s = time.time() - 10**5
        for path in (*tmp_path.glob(".work/dead.a/*"), *tmp_path.glob(".work/running.a/*")):
            os.utime(path, (long_ago_s, long_ago_s))
            os.utime(path.parent, (long_ago_s, long_ago_s))
        store.sweep(time.time(), keep={"running"})
        assert {path.name for path in (tmp_path / ".work").iterdir()} == {"running.a", "new.a"}
        store.clear_drafts(keep={"running"})
        assert {path.name for path in (tmp_path / ".work").iterdir()} == {"running.a"}

    def test_files_of_others_in_the_directory_stay(self, tmp_path: Path) -> None:
        store = LocalOutputs(tmp_path, Retention(max_age_s=0, max_bytes=0, min_age_s=0))
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "notes").mkdir()
        (tmp_path / "a.b").mkdir()
        store.sweep(time.time() + 10**6, NO_JOBS)
        assert {path.name for path in tmp_path.glob("[!.]*")} == {"notes.txt", "notes", "a.b"}


# A disk of 256 kB, in a mount namespace of its own. Arguments: its directory, an mp4.
ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from wanfit.errors import DiskFull
from wanfit.outputs import LocalOutputs, Retention
disk, clip = Path(sys.argv[1]), Path(sys.argv[2])
store = LocalOutputs(disk, Retention(min_free_bytes=0))
filler = disk / "filler"
for left in range(0, 12000, 4096):
    free = store.free_bytes()
    filler.write_bytes(bytes(max(0, free - left)))
    try:
        store.keep(clip, job_id="job", attempt=1, lease="a", metadata={})
    except DiskFull as error:
        print(error)
    else:
        print("kept")
    names = [str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file()]
    assert names == ["filler"], names
    assert not any((disk / ".work").iterdir())
    filler.unlink()
store.keep(clip, job_id="job", attempt=1, lease="a", metadata={})
print("whole")
"""


def test_a_disk_that_fills_is_a_typed_error_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    write_clip(tmp_path / "clip.mp4")
    for unshare in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        tried = [*unshare, "mount", "-t", "tmpfs", "none", str(disk)]
        if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("this machine lets nobody mount a tmpfs")
    mount = f'mount -t tmpfs -o size=256k none {disk} && exec "$@"'
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(tmp_path / "clip.mp4")]
    ended = subprocess.run(
        [*unshare, "sh", "-c", mount, "sh", *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    *full, whole = ended.stdout.splitlines()
    assert whole == "whole"
    assert len(full) >= 2
    assert all("is full" in line and "MB free" in line for line in full), full


def test_importing_the_store_imports_neither_torch_nor_boto3() -> None:
    """The store is imported by the server, which never imports torch."""
    code = "import sys, wanfit.outputs; sys.exit('torch' in sys.modules or 'boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
