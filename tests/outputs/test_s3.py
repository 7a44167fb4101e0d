"""Clips in S3, against rclone's server of it on the loopback: whole, signed, and never lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.outputs.clips import everything, keep_one
from tests.outputs.rclone import KEY, SECRET, Rclone, serving
from wanfit.errors import BadSetting, DiskFull, NotKept, StoreFailed, StoreGone, StoreRefused
from wanfit.outputs import Kept, LocalOutputs, Retention, open_store
from wanfit.outputs.bucket import Bucket, Place
from wanfit.outputs.s3 import S3Outputs

RULES = Retention(min_free_bytes=0, min_age_s=0)
PATIENCE_S = 120.0  # on a busy machine; what is waited for comes in a second or two
NAMES = ("clip.mp4", "metadata.json", "spritesheet.jpg", "thumbnail.webp")


@pytest.fixture(scope="module")
def rclone() -> Iterator[Rclone]:
    with serving() as server:
        yield server


@dataclass
class Shelf:
    """A bucket of its own for one test."""

    server: Rclone
    bucket: Path
    place: Place
    spool: Path

    def open(self, rules: Retention = RULES, patience_s: float = PATIENCE_S) -> S3Outputs:
        return S3Outputs(Bucket(self.place), self.spool, rules, patience_s=patience_s)

    def names(self) -> set[str]:
        return everything(self.bucket)


@pytest.fixture
def shelf(rclone: Rclone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = re.sub(r"[^a-z0-9]", "", tmp_path.name.lower())[:50]
    bucket = rclone.root / name
    bucket.mkdir()
    place = Place.parse(f"s3://{name}/videos/here", rclone.url)
    yield Shelf(rclone, bucket, place, rclone.root.parent / f"spool-{name}")
    if rclone.process is None:
        rclone.start()


@pytest.fixture
def store(shelf: Shelf) -> Iterator[S3Outputs]:
    with closing(shelf.open()) as store:
        yield store


class TestKeeping:
    def test_a_clip_comes_whole_and_leaves_nothing_here(
        self, store: S3Outputs, shelf: Shelf
    ) -> None:
        kept = keep_one(store)
        assert shelf.names() == {f"videos/here/job.a/{name}" for name in NAMES}
        assert everything(shelf.spool) == set()
        assert store.pending() == (frozenset(), None)
        video = shelf.bucket / "videos/here/job.a/clip.mp4"
        assert hashlib.sha256(video.read_bytes()).hexdigest() == kept.sha256
        (stored,) = store.keys()
        assert (stored.key, stored.job_id) == ("job.a", "job")
        assert stored.num_bytes > kept.num_bytes

    def test_asked_again_by_the_same_lease_it_answers_as_before(self, store: S3Outputs) -> None:
        kept = keep_one(store)
        draft = store.draft("job", "a")
        again = store.keep(draft, job_id="job", attempt=1, lease="a", metadata={})
        assert again == kept

    def test_ranges_are_read_from_there(self, store: S3Outputs, shelf: Shelf) -> None:
        kept = keep_one(store)
        data = (shelf.bucket / "videos/here/job.a/clip.mp4").read_bytes()
        for start, stop in ((0, None), (10, 20), (5, 10**9), (10**9, None), (7, 7)):
            body = store.open(kept.key, start, stop)
            assert b"".join(body.pieces) == data[start:stop]
            assert body.whole_bytes == len(data)
            body.close()
        fields = json.loads(b"".join(store.open(kept.key, variant="metadata").pieces))
        assert Kept.from_json({name: fields[name] for name in Kept.__slots__}) == kept

    def test_a_signed_address_gives_it_to_anybody_for_a_while(self, store: S3Outputs) -> None:
        kept = keep_one(store)
        url = store.url(kept.key, 1, name='../my "clip".mp4\r\nX: y')
        assert url is not None
        assert SECRET not in url
        with urllib.request.urlopen(url) as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == kept.sha256
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(url.replace("job.a", "job.b"))
        assert raised.value.code == 403
        raised.value.close()
        time.sleep(2.1)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(url)
        assert raised.value.code in (400, 403)  # rclone says 400, Amazon 403
        raised.value.close()

    def test_what_is_deleted_is_gone(self, store: S3Outputs, shelf: Shelf) -> None:
        kept = keep_one(store)
        store.delete(kept.key)
        store.delete(kept.key)
        assert shelf.names() == set()
        assert list(store.keys()) == []
        with pytest.raises(NotKept):
            store.open(kept.key)

    @pytest.mark.parametrize("key", ["", "..", "../../etc.x", "job", "a/b.c", "job.a/../job.b"])
    def test_a_key_that_is_none_reaches_nothing(self, store: S3Outputs, key: str) -> None:
        keep_one(store)
        store.delete(key)
        assert store.url(key, 60) is None
        with pytest.raises(NotKept):
            store.open(key)
        assert len(list(store.keys())) == 1

    def test_a_large_clip_goes_up_in_parts_that_memory_does_not_notice(
        self, shelf: Shelf, tmp_path: Path
    ) -> None:
        """100 MB, in a process of its own: its peak grows by the parts on their way alone."""
        large = tmp_path / "large.bin"
        with large.open("wb") as file:
            file.truncate(100_000_000)
        script = (
            "import resource, sys; from pathlib import Path\n"
            "from wanfit.outputs.bucket import Bucket, Place\n"
            "bucket = Bucket(Place.parse(sys.argv[1], sys.argv[2]))\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "bucket.check(); before = peak()\n"
            "bucket.upload(Path(sys.argv[3]), 'large', 'video/mp4', {})\n"
            "assert bucket.size('large') == 100_000_000\n"
            "print(peak() - before)\n"
        )
        place = f"s3://{shelf.place.bucket}"
        ended = subprocess.run(
            [sys.executable, "-c", script, place, shelf.server.url, str(large)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(ended.stdout) < 90_000_000


class TestTrouble:
    def test_s3_gone_for_a_while_loses_nothing_and_holds_nobody_up(self, shelf: Shelf) -> None:
        with closing(shelf.open()) as store:
            shelf.server.stop()
            began_s = time.monotonic()
            kept = [keep_one(store, f"job{i}") for i in range(3)]
            assert time.monotonic() - began_s < PATIENCE_S  # which `keep` would have had
            waiting, trouble = store.pending()
            assert waiting == {clip.key for clip in kept}
            assert isinstance(trouble, StoreGone)
            with pytest.raises(StoreGone, match="does not answer"):
                store.settle(0.1)
            # Meanwhile it is read from here, and has no address there.
            data = b"".join(store.open(kept[0].key).pieces)
            assert hashlib.sha256(data).hexdigest() == kept[0].sha256
            assert store.url(kept[0].key, 60) is None
            with pytest.raises(StoreGone):
                list(store.keys())
            with pytest.raises(StoreGone):
                store.sweep(time.time(), set())

            shelf.server.start()
            store.settle(PATIENCE_S)
            assert store.pending() == (frozenset(), None)
            assert len(shelf.names()) == 12
            assert everything(shelf.spool) == set()
            assert {stored.key for stored in store.keys()} == {clip.key for clip in kept}  # noqa: SIM118
            assert store.url(kept[0].key, 60) is not None

    def test_the_next_process_uploads_what_a_killed_one_left(self, shelf: Shelf) -> None:
        shelf.server.stop()
        script = (
            "import sys; from pathlib import Path; from tests.outputs.test_s3 import *\n"
            "place = Place.parse(sys.argv[1], sys.argv[2])\n"
            "store = S3Outputs(Bucket(place), Path(sys.argv[3]), RULES, patience_s=0.1)\n"
            "keep_one(store); print('kept', flush=True); time.sleep(60)\n"
        )
        place = f"s3://{shelf.place.bucket}/videos/here"
        with subprocess.Popen(
            [sys.executable, "-c", script, place, shelf.server.url, str(shelf.spool)],
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"kept\n"
            process.kill()
        assert len(everything(shelf.spool)) == 4
        shelf.server.start()
        with closing(shelf.open()) as store:
            store.settle(PATIENCE_S)
        assert len(shelf.names()) == 4
        assert everything(shelf.spool) == set()

    def test_a_clip_that_is_deleted_before_its_upload_never_appears(self, shelf: Shelf) -> None:
        shelf.server.stop()
        with closing(shelf.open(patience_s=0.1)) as store:
            kept = keep_one(store)
            with pytest.raises(StoreGone):
                store.delete(kept.key)
            shelf.server.start()
            store.settle(PATIENCE_S)
            time.sleep(0.2)
            assert shelf.names() == set()
            assert everything(shelf.spool) == set()

    def test_wrong_credentials_are_said_at_the_start_and_lose_nothing_later(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with closing(shelf.open(patience_s=5)) as store:
            with pytest.raises(StoreRefused, match="refuses") as raised:
                store.check()
            assert "another" not in str(raised.value)
            kept = keep_one(store)
            waiting, trouble = store.pending()
            assert waiting == {kept.key}
            assert isinstance(trouble, StoreRefused)
        with pytest.raises(StoreRefused):
            open_store(f"s3://{shelf.place.bucket}", spool=shelf.spool, retention=RULES,
                       s3_endpoint=shelf.server.url)  # fmt: skip

    def test_a_server_starts_while_s3_is_away_and_says_so(
        self, shelf: Shelf, caplog: pytest.LogCaptureFixture
    ) -> None:
        shelf.server.stop()
        place = f"s3://{shelf.place.bucket}"
        store = open_store(place, spool=shelf.spool, retention=RULES, s3_endpoint=shelf.server.url)
        assert isinstance(store, S3Outputs)
        with closing(store):
            assert "does not answer" in caplog.text
            kept = keep_one(store)
            shelf.server.start()
            store.settle(PATIENCE_S)
            assert f"{kept.key}/clip.mp4" in shelf.names()

    def test_a_bucket_that_is_not_there_is_said_at_the_start(self, shelf: Shelf) -> None:
        with pytest.raises(StoreFailed):
            Bucket(Place.parse("s3://no-such-bucket", shelf.server.url)).check()

    @pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "both"])
    def test_half_a_setting_names_the_other_half(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            if missing in (name, "both"):
                monkeypatch.delenv(name)
        with pytest.raises(BadSetting, match="AWS_SECRET_ACCESS_KEY"):
            Bucket(shelf.place)

    @pytest.mark.parametrize(
        "place", ["s3:", "s3://", "s3://A", "s3://a_b/x", "s3://bucket/../x y"]
    )
    def test_a_place_that_is_none_is_refused(self, tmp_path: Path, place: str) -> None:
        with pytest.raises(BadSetting, match="s3://BUCKET"):
            open_store(place, spool=tmp_path, retention=RULES)

    def test_a_directory_is_a_store_too(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path / "clips"), spool=tmp_path / "spool", retention=RULES)
        assert isinstance(store, LocalOutputs)

    def test_a_full_disk_here_is_said_before_a_job_begins(self, shelf: Shelf) -> None:
        full = shelf.open(Retention(min_free_bytes=1 << 60))
        with closing(full) as store, pytest.raises(DiskFull):
            store.check_room()

    def test_a_store_that_hangs_is_noticed_and_asked_again(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGSTOP: connections are taken and nothing is answered."""
        monkeypatch.setattr("wanfit.outputs.bucket.READ_S", 0.5)
        with closing(shelf.open(patience_s=10)) as store:
            assert shelf.server.process is not None
            shelf.server.process.send_signal(signal.SIGSTOP)
            try:
                kept = keep_one(store)
                assert isinstance(store.pending()[1], StoreGone)
            finally:
                shelf.server.process.send_signal(signal.SIGCONT)
            store.settle(PATIENCE_S)
            assert f"videos/here/{kept.key}/clip.mp4" in shelf.names()


class TestRetention:
    def aged(self, store: S3Outputs, shelf: Shelf) -> int:
        """Three clips, of 300, 200 and 100 seconds ago; the bytes of one."""
        for age_s in (100, 300, 200):
            kept = keep_one(store, f"job{age_s}")
            for name in NAMES:
                path = shelf.bucket / "videos/here" / kept.key / name
                os.utime(path, (time.time() - age_s, time.time() - age_s))
        return max(stored.num_bytes for stored in store.keys())  # noqa: SIM118

    def left(self, store: S3Outputs) -> set[str]:
        return {stored.job_id for stored in store.keys()}  # noqa: SIM118

    def test_by_age_and_by_size(self, shelf: Shelf) -> None:
        with closing(shelf.open()) as store:
            one = self.aged(store, shelf)
        with closing(shelf.open(Retention(max_age_s=250, min_free_bytes=0, min_age_s=0))) as store:
            assert [clip.job_id for clip in store.sweep(time.time(), set()).deleted] == ["job300"]
            assert self.left(store) == {"job100", "job200"}
        rules = Retention(max_bytes=one + 10, min_free_bytes=0, min_age_s=0)
        with closing(shelf.open(rules)) as store:
            assert store.sweep(time.time(), {"job100", "job200"}).deleted == ()
            assert [clip.job_id for clip in store.sweep(time.time(), set()).deleted] == ["job200"]
            assert self.left(store) == {"job100"}

    def test_other_objects_in_the_bucket_stay_and_halves_go_when_they_are_old(
        self, store: S3Outputs, shelf: Shelf
    ) -> None:
        mine = shelf.bucket / "videos/here/notes.txt"
        half = shelf.bucket / "videos/here/job.x/thumbnail.webp"
        new = shelf.bucket / "videos/here/job.y/thumbnail.webp"
        for path in (mine, half, new):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        long_ago_s = time.time() - 3 * 86400
        for path in (mine, half):
            os.utime(path, (long_ago_s, long_ago_s))
        assert list(store.keys()) == []
        store.sweep(time.time(), set())
        assert shelf.names() == {"videos/here/notes.txt", "videos/here/job.y/thumbnail.webp"}


def test_a_closed_store_leaves_no_thread(shelf: Shelf) -> None:
    before = threading.active_count()
    stores: list[Callable[[], None]] = [shelf.open().close for _ in range(3)]
    for close in stores:
        close()
    assert threading.active_count() == before
