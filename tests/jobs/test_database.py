"""What a database can do wrong: locked, full, away, of a newer wanfit, on a network; and clocks."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.jobs.postgres import Postgres
from tests.jobs.samples import REPORT, Clock, claimed, kept_by, new_job
from wanfit.errors import BadSetting, DatabaseBusy, DiskFull, StaleLease
from wanfit.jobs import filesystem, schema
from wanfit.jobs.job import Job, Progress
from wanfit.jobs.store import JobStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


class TestPlaces:
    def test_every_spelling_of_a_path_is_one_database(
        self, path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        job, _ = open_store(str(path)).submit(new_job())
        assert open_store(f"sqlite:///{path}").get(job.id) == job

    @pytest.mark.parametrize(
        "url", ["sqlite://", "sqlite:///:memory:", "mysql://h/d", "http://x", "postgresql://:x:y"]
    )
    def test_what_keeps_no_jobs_is_refused(self, url: str) -> None:
        with pytest.raises(BadSetting):
            JobStore(url)

    def test_a_file_that_is_no_database_is_refused(self, path: Path) -> None:
        path.write_bytes(b"not a database, but long enough to have a header of one" * 100)
        with pytest.raises(BadSetting, match="no whole job database"):
            JobStore(str(path))

    def test_a_directory_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BadSetting, match="cannot be opened"):
            JobStore(str(tmp_path / "file" / "jobs.db"))

    def test_a_database_of_a_newer_wanfit_is_refused(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(database_url)
        with store._database.write() as tx:
            tx.execute(sa.update(schema.about).values(value=str(schema.VERSION + 1)))
        with pytest.raises(BadSetting, match="version 2"):
            JobStore(database_url)

    @pytest.mark.parametrize(
        ("magic", "mounted_as", "kind"),
        [
            (0x6969, "nfs4", "NFS"),
            (0xFE534D42, "cifs", "SMB"),
            (0xFF534D42, "cifs", "CIFS"),
            (0x01021997, "9p", "9p"),
            (0x0BD00BD0, "lustre", "Lustre"),
            (0x65735546, "fuse.sshfs", "FUSE (fuse.sshfs)"),
            (0x65735546, "fuse", "FUSE (fuse)"),
            (0x65735546, "virtiofs", "FUSE (virtiofs)"),
            (0x65735546, "fuseblk", None),
            (0xEF53, "ext4", None),
            (0x01021994, "tmpfs", None),
        ],
    )
    def test_a_network_file_system_is_refused_by_name(
        self,
        magic: int,
        mounted_as: str,
        kind: str | None,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(filesystem, "_magic", lambda _: magic)
        monkeypatch.setattr(filesystem, "_mounted_as", lambda _: mounted_as)
        if kind is None:
            JobStore(str(path)).close()
            return
        with pytest.raises(BadSetting) as refused:
            JobStore(str(path))
        assert f"({kind})" in refused.value.message
        assert not path.exists()

    def test_the_kernel_tells_the_kind_of_this_disk(self, tmp_path: Path) -> None:
        """The numbers that we read are those of stat(1)."""
        told = subprocess.run(
            ["stat", "-f", "-c", "%t", str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert filesystem._magic(tmp_path) == int(told.stdout, 16)
        assert filesystem._mounted_as(Path("/proc")) == "proc"

    def test_prompts_are_for_the_eyes_of_the_server_only(
        self, path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        open_store(str(path)).submit(new_job())
        files = list(path.parent.glob("jobs.db*"))
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

    def test_job_state_is_synced_and_progress_is_not(
        self, path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        """2 is FULL, 1 is NORMAL (sqlite.org/pragma.html)."""
        database = open_store(str(path))._database
        for begin, synchronous in ((database.write, 2), (database.note, 1)):
            with begin() as tx:
                assert tx.connection.exec_driver_sql("PRAGMA synchronous").scalar() == synchronous
                assert tx.connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
                assert tx.connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 10_000


class TestBeingAway:
    def test_a_locked_database_is_waited_for(
        self, path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(str(path))
        holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        holder.execute("BEGIN IMMEDIATE")
        threading.Timer(0.5, lambda: holder.execute("ROLLBACK")).start()
        began_s = time.monotonic()
        store.submit(new_job())
        assert time.monotonic() - began_s >= 0.4
        holder.close()

    def test_one_that_stays_locked_is_an_error_that_says_so_and_loses_nothing(
        self, path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(str(path), busy_s=0.2)
        job, _ = store.submit(new_job())
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        for write in (
            lambda: store.submit(new_job()),
            lambda: store.claim("w"),
            lambda: store.cancel(job.id),
        ):
            with pytest.raises(DatabaseBusy):
                write()
        assert store.get(job.id) == job  # readers go on
        holder.execute("ROLLBACK")
        holder.close()
        assert claimed(store).job.id == job.id
        assert sum(store.counts().values()) == 1

    def test_postgres_that_ends_its_connections_is_asked_anew(
        self, postgres: Postgres, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(postgres.empty_database())
        job, _ = store.submit(new_job())
        postgres.end_connections()
        assert store.get(job.id) == job
        postgres.end_connections()
        assert claimed(store).job.id == job.id

    def test_no_postgres_there_is_an_error_that_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(DatabaseBusy, match="does not answer"):
            JobStore(f"postgresql://nobody@/x?host={tmp_path}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class TestFullDisk:
    def test_a_job_is_accepted_whole_or_refused_and_those_before_it_stay(
        self, small_disk: Path, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(str(small_disk / "jobs.db"))
        accepted: list[Job] = []

        def fill() -> None:
            while len(accepted) < 1000:
                accepted.append(store.submit(new_job(image=b"x" * 20_000))[0])

        with pytest.raises(DiskFull):
            fill()
        assert len(accepted) > 5
        assert [store.get(job.id) for job in accepted] == accepted
        assert store.counts()["queued"] == len(accepted)
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        more, _ = store.submit(new_job())
        assert claimed(store).job.id == accepted[0].id
        assert store.get(more.id) == more

    def test_a_file_that_may_not_grow_is_no_end_of_the_server(self, path: Path) -> None:
        """RLIMIT_FSIZE, as a quota would have it: an error, and the database is whole after it."""
        code = f"""
import resource, signal
from wanfit.errors import DiskFull, DatabaseBusy
from wanfit.jobs.store import JobStore
from tests.jobs.samples import new_job
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = JobStore({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
count = 0
try:
    while True:
        store.submit(new_job(image=b"x" * 20_000))
        count += 1
except (DiskFull, DatabaseBusy):
    pass
assert store.counts()["queued"] == count > 3
print(count)
"""
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        store = JobStore(str(path))
        assert store.counts()["queued"] == int(done.stdout)
        store.close()


class TestClocks:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def clocked(
        self, clock: Clock, database_url: str, open_store: Callable[..., JobStore]
    ) -> JobStore:
        return open_store(
            database_url, lease_s=10.0, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s
        )

    @pytest.mark.parametrize("jump_s", [-(10.0**9), -3600.0, 3600.0, 10.0**9])
    def test_a_jump_of_the_wall_clock_takes_no_job_from_its_worker(
        self, clock: Clock, clocked: JobStore, jump_s: float
    ) -> None:
        clocked.submit(new_job(deadline_s=clock.wall + 60))
        waiting, _ = clocked.submit(new_job(deadline_s=clock.wall + 60))
        claim = claimed(clocked)
        clocked.reap()
        clock.wall += jump_s
        assert clocked.reap() == []
        clock.pass_s(9)
        assert clocked.reap() == []
        assert clocked.get(waiting.id).state == "queued"
        assert clocked.complete(claim, kept_by(claim), REPORT).state == "completed"

    def test_a_silent_worker_loses_its_lease_and_one_that_beats_does_not(
        self, clock: Clock, clocked: JobStore
    ) -> None:
        silent, alive = (clocked.submit(new_job())[0] for _ in range(2))
        stale, held = claimed(clocked), claimed(clocked)
        for _ in range(3):
            clocked.reap()
            clock.pass_s(4)
            clocked.heartbeat(held, Progress(1.0))
        assert [job.id for job in clocked.reap()] == [silent.id]
        assert clocked.get(alive.id).state == "running"
        with pytest.raises(StaleLease):
            clocked.heartbeat(stale)

    def test_a_deadline_passes_with_the_seconds_that_go_by(
        self, clock: Clock, clocked: JobStore
    ) -> None:
        new = new_job(deadline_s=clock.wall + 60, webhook="https://example.org")
        job, _ = clocked.submit(new)
        clock.wall -= 10**6
        clock.pass_s(61)
        assert clocked.claim("w") is None  # it is not taken, even before anybody reaps
        assert clocked.get(job.id).state == "expired"
        assert [notice.state for notice in clocked.due_notices()] == ["expired"]

    def test_a_job_that_began_in_time_may_end_after_its_deadline(
        self, clock: Clock, clocked: JobStore
    ) -> None:
        clocked.submit(new_job(deadline_s=clock.wall + 60))
        claim = claimed(clocked)
        clock.pass_s(5)
        clocked.heartbeat(claim)
        clocked.reap()
        clock.pass_s(9)
        clocked.heartbeat(claim)
        clock.pass_s(60)
        assert clocked.complete(claim, kept_by(claim), REPORT).state == "completed"
