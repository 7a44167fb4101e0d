"""Jobs from the queue to their files, with real processes that die, hang and are told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.servers import (
    PATIENCE,
    Server,
    environment,
    outputs_in,
    running_server,
    wait_for,
)
from wanfit.errors import DiskFull, NoSuchJob, StoreGone
from wanfit.jobs.job import Job
from wanfit.jobs.store import JobStore
from wanfit.jobs.telemetry import AttemptEnded, JobEnded, ProcessEnded, StageEnded
from wanfit.outputs import Kept, LocalOutputs, Retention

PLAN = {"host_peak_bytes": 10**9, "stages": [{"stage": "denoise", "elapsed_s": 1.0}]}


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marks").mkdir()
    for name, value in environment(tmp_path / "marks").items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def disk_store(tmp_path: Path, open_store: Callable[..., JobStore]) -> JobStore:
    """On SQLite: which database it is changes nothing here."""
    return open_store(str(tmp_path / "jobs.db"))


@pytest.fixture
def server(disk_store: JobStore, tmp_path: Path) -> Iterator[Server]:
    with running_server(disk_store, tmp_path) as running:
        yield running


def only_files_of(server: Server, *jobs: Job) -> None:
    """The clips of these jobs are kept, and nothing else is left anywhere."""
    keys = {job.result.key for job in jobs if job.result is not None}
    assert {file.key for file in server.outputs.keys()} == keys  # noqa: SIM118  it is no dict
    outputs = server.outputs
    assert isinstance(outputs, LocalOutputs)
    wait_for(lambda: list(outputs._work.iterdir()) == [])


def told_kinds(server: Server, job: Job) -> list[str]:
    return [event.kind for event in server.store.events(job.id)]


class TestMaking:
    def test_jobs_are_made_one_after_the_other_by_one_warm_process(self, server: Server) -> None:
        pid = server.pid()
        jobs = [server.submit("make", plan=PLAN) for _ in range(3)]
        done = [server.wait(job) for job in jobs]
        assert [job.state for job in done] == ["completed"] * 3
        assert server.pid() == pid
        ended_s = [job.ended_s or 0.0 for job in done]
        assert ended_s == sorted(ended_s)
        only_files_of(server, *done)
        assert told_kinds(server, jobs[0])[:3] == ["queued", "started", "stage"]
        assert told_kinds(server, jobs[0])[-2:] == ["stage", "completed"]
        result = done[0].result
        assert result is not None
        assert b"".join(server.outputs.open(result.key).pieces)[4:8] == b"ftyp"
        assert done[0].report == {"output": result.key, "total_s": 0.1}

    def test_who_counts_is_told_of_stages_and_ends(self, server: Server) -> None:
        server.wait(server.submit("make"))
        wait_for(lambda: any(isinstance(seen, JobEnded) for seen in server.seen))
        stages = [seen.stage for seen in server.seen if isinstance(seen, StageEnded)]
        assert stages == ["denoise", "decode"]
        (ended,) = [seen for seen in server.seen if isinstance(seen, JobEnded)]
        assert ended.ran_s is not None
        assert ended.ran_s >= 0

    def test_the_input_image_reaches_the_engine(self, server: Server) -> None:
        job = server.wait(server.submit("image", image=b"png bytes"))
        notices = [e.data for e in server.store.events(job.id) if e.kind == "notice"]
        assert notices == [{"message": "the image is cG5nIGJ5dGVz"}]

    def test_an_error_that_another_attempt_would_meet_again_fails_the_job(
        self, server: Server
    ) -> None:
        pid = server.pid()
        job = server.wait(server.submit("refuse"))
        assert (job.state, job.attempts) == ("failed", 1)
        assert job.error is not None
        assert (job.error.code, job.error.hint) == ("does_not_fit", "Ask for 8")
        assert server.pid() == pid
        only_files_of(server)

    def test_the_server_imports_no_torch(self) -> None:
        code = (
            "import sys, wanfit.jobs.supervisor, wanfit.jobs.store\n"
            "assert not {'torch', 'numpy', 'av'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestDying:
    def test_a_killed_process_is_replaced_and_its_job_runs_again(self, server: Server) -> None:
        job = server.submit("steady")
        server.wait_until_it_runs(job)
        pid = server.pid()
        os.kill(pid, signal.SIGKILL)
        done = server.wait(job)
        assert (done.state, done.attempts) == ("completed", 2)
        assert server.pid() != pid
        assert [s.code for s in server.seen if isinstance(s, ProcessEnded)] == ["worker_killed"]
        assert any(isinstance(seen, AttemptEnded) for seen in server.seen)
        only_files_of(server, done)

    @pytest.mark.parametrize("way", ["segv", "kill", "exit", "break"])
    def test_a_process_that_dies_once_costs_an_attempt(self, server: Server, way: str) -> None:
        done = server.wait(server.submit(f"{way} once"))
        assert (done.state, done.attempts) == ("completed", 2)
        assert server.supervisor.status()[0].restarts == 1
        only_files_of(server, done)

    @pytest.mark.parametrize(
        ("way", "code", "word"),
        [
            ("segv", "worker_crashed", "SIGSEGV"),
            ("exit", "worker_crashed", "exit code 3"),
            ("break", "internal_error", "ValueError"),
        ],
    )
    def test_a_job_that_ends_its_process_twice_is_failed_and_the_queue_goes_on(
        self, server: Server, way: str, code: str, word: str
    ) -> None:
        bad = server.submit(way, plan=PLAN)
        good = server.submit("make")
        failed = server.wait(bad)
        assert (failed.state, failed.attempts) == ("failed", 2)
        assert failed.error is not None
        assert failed.error.code == code
        assert word in failed.error.message
        assert "/secret" not in failed.error.message
        assert failed.error.plan == PLAN
        assert server.wait(good).state == "completed"

    def test_a_process_that_does_nothing_is_killed(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        impatient = replace(PATIENCE, hang_s=0.5)
        with running_server(disk_store, tmp_path, patience=impatient) as server:
            done = server.wait(server.submit("hang once"))
            assert (done.state, done.attempts) == ("completed", 2)
            assert server.supervisor.status()[0].last_end == "worker_hung"

    def test_a_process_that_stands_still_is_killed_too(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        """SIGSTOP: it neither reads nor answers."""
        impatient = replace(PATIENCE, hang_s=1.0)
        with running_server(disk_store, tmp_path, patience=impatient) as server:
            job = server.submit("steady")
            server.wait_until_it_runs(job)
            os.kill(server.pid(), signal.SIGSTOP)
            assert server.wait(job).attempts == 2

    def test_an_idle_process_that_dies_is_replaced_before_the_next_job(
        self, server: Server
    ) -> None:
        pid = server.pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.supervisor.status()[0].restarts == 1)
        done = server.wait(server.submit("make"))
        assert (done.state, done.attempts) == ("completed", 1)

    def test_a_process_that_does_not_start_loses_no_job(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        with running_server(disk_store, tmp_path, module="tests.jobs.nowhere") as server:
            job = server.submit("make")
            wait_for(lambda: server.supervisor.status()[0].state == "failing")
            assert server.supervisor.status()[0].last_end == "start_failed"
            assert server.store.get(job.id).attempts == 0
        with running_server(disk_store, tmp_path) as server:
            assert server.wait(job).state == "completed"


class TestStopping:
    def test_a_cancel_ends_the_attempt_at_its_next_step(self, server: Server) -> None:
        """And the process stays warm, with nothing left of the clip."""
        job = server.submit("slow")
        server.wait_until_it_runs(job)
        pid = server.pid()
        server.store.cancel(job.id)
        began_s = time.monotonic()
        assert server.wait(job).state == "cancelled"
        assert time.monotonic() - began_s < 5  # and not the 20 s of the clip
        assert server.pid() == pid
        only_files_of(server)

    def test_a_process_that_does_not_hear_a_cancel_is_killed(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        with running_server(
            disk_store, tmp_path, patience=replace(PATIENCE, cancel_s=0.3)
        ) as server:
            job = server.submit("hang")
            server.wait_until_it_runs(job)
            pid = server.pid()
            server.store.cancel(job.id)
            assert server.wait(job).state == "cancelled"
            assert server.wait(server.submit("make")).state == "completed"
            assert server.pid() != pid

    def test_an_attempt_that_takes_too_long_fails(self, server: Server) -> None:
        job = server.wait(server.submit("slow", timeout_s=0.5, plan=PLAN))
        assert job.state == "failed"
        assert job.error is not None
        assert (job.error.code, job.error.plan) == ("timed_out", PLAN)

    def test_a_deleted_job_stops_and_leaves_nothing(self, server: Server) -> None:
        job = server.submit("slow")
        server.wait_until_it_runs(job)
        server.supervisor.delete(job.id)
        with pytest.raises(NoSuchJob):
            server.store.get(job.id)
        done = server.wait(server.submit("make"))
        only_files_of(server, done)
        server.supervisor.delete(done.id)
        only_files_of(server)

    def test_a_job_may_finish_within_the_grace(self, disk_store: JobStore, tmp_path: Path) -> None:
        with running_server(disk_store, tmp_path, grace_s=60) as server:
            job = server.submit("steady")
            waiting = server.submit("make")
            server.wait_until_it_runs(job)
        assert disk_store.get(job.id).state == "completed"
        assert disk_store.get(waiting.id).state == "queued"

    def test_a_job_goes_back_to_the_queue_when_the_grace_is_over(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        with running_server(disk_store, tmp_path, grace_s=0.2) as server:
            job = server.submit("slow once")
            server.wait_until_it_runs(job)
            pid = server.pid()
        assert not Path(f"/proc/{pid}").exists()
        back = disk_store.get(job.id)
        assert (back.state, back.attempts, back.percent) == ("queued", 1, 0.0)
        with running_server(disk_store, tmp_path) as server:
            done = server.wait(job)
            assert (done.state, done.attempts) == ("completed", 2)
            only_files_of(server, done)


class Awkward(LocalOutputs):
    """A store of outputs that fails as often as it is told, or waits for a word."""

    def __init__(self, directory: Path, failures: list[Exception]) -> None:
        super().__init__(directory, Retention(min_free_bytes=0))
        self.failures = failures
        self.calls = 0
        self.go = threading.Event()
        self.go.set()

    def keep(self, file: Path, **options: Any) -> Kept:
        self.calls += 1
        self.go.wait(30)
        if self.failures:
            raise self.failures.pop()
        return super().keep(file, **options)


class TestKeeping:
    def test_a_store_that_is_gone_for_a_while_costs_no_clip(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        """The clip waits, and is not made again."""
        outputs = Awkward(tmp_path / "out", [StoreGone("S3 does not answer")] * 2)
        with running_server(disk_store, tmp_path, outputs=outputs) as server:
            done = server.wait(server.submit("make"))
        assert (done.state, done.attempts, outputs.calls) == ("completed", 1, 3)

    def test_a_lease_is_kept_while_files_are_put_away(
        self, tmp_path: Path, open_store: Callable[..., JobStore]
    ) -> None:
        store = open_store(str(tmp_path / "jobs.db"), lease_s=2.5)
        outputs = Awkward(tmp_path / "out", [])
        outputs.go.clear()
        with running_server(store, tmp_path, outputs=outputs) as server:
            job = server.submit("make")
            wait_for(lambda: outputs.calls)
            time.sleep(6)  # two reaps and more
            assert server.store.get(job.id).stage == "keep"
            outputs.go.set()
            assert server.wait(job).attempts == 1

    def test_a_cancel_while_files_are_put_away_is_kept_as_a_promise(
        self, disk_store: JobStore, tmp_path: Path
    ) -> None:
        outputs = Awkward(tmp_path / "out", [])
        outputs.go.clear()
        with running_server(disk_store, tmp_path, outputs=outputs) as server:
            job = server.submit("make")
            wait_for(lambda: outputs.calls)
            server.store.cancel(job.id)
            outputs.go.set()
            ended = server.wait(job)
            assert (ended.state, ended.result) == ("cancelled", None)
            wait_for(lambda: server.supervisor.status()[0].state == "idle")
            only_files_of(server)

    @pytest.mark.parametrize("error", [DiskFull("full"), ValueError("no video in it")])
    def test_a_clip_that_is_lost_before_it_is_kept_is_made_again(
        self, disk_store: JobStore, tmp_path: Path, error: Exception
    ) -> None:
        class Losing(Awkward):
            def keep(self, file: Path, **options: Any) -> Kept:
                if self.failures:
                    file.unlink()
                return super().keep(file, **options)

        outputs = Losing(tmp_path / "out", [error])
        with running_server(disk_store, tmp_path, outputs=outputs) as server:
            done = server.wait(server.submit("make"))
            assert (done.state, done.attempts) == ("completed", 2)
            only_files_of(server, done)

    def test_a_full_disk_sends_the_job_back_and_not_away(self, server: Server) -> None:
        done = server.wait(server.submit("full once"))
        assert (done.state, done.attempts) == ("completed", 2)
        only_files_of(server, done)

    def test_no_job_is_taken_while_the_disk_has_no_room(
        self, disk_store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outputs = outputs_in(tmp_path)
        room = [False]

        def check_room(num_bytes: int = 0) -> None:
            if not room[0]:
                raise DiskFull("0 bytes are free")

        monkeypatch.setattr(outputs, "check_room", check_room)
        with running_server(disk_store, tmp_path, outputs=outputs) as server:
            job = server.submit("make")
            wait_for(lambda: server.supervisor.status()[0].state == "no_room")
            assert server.store.get(job.id).state == "queued"
            room[0] = True
            assert server.wait(job).attempts == 1
