"""A server that is killed, or stopped past its lease, at each labelled point of a job's way.

The server is a real process with a real GPU process; the point is reached, the process dies with
SIGKILL, and another server starts on the same database and directory. Whatever the point: the job
is completed, once, with one clip, one notice and no file too many.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.postgres import Postgres
from tests.jobs.servers import Server, does, environment, running_server, start_server, wait_for
from wanfit.jobs.job import Job
from wanfit.jobs.store import JobStore
from wanfit.outputs import LocalOutputs

NEW = does("make", idempotency_key="k", webhook="https://example.org")
MADE_AGAIN = (
    "after-claim-commit",
    "after-generate",
    "before-rename",
)
NOT_MADE_AGAIN = ("after-rename", "after-keep", "before-complete-commit")
ENDED = ("after-complete-commit", "after-clean")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marks").mkdir()
    for name, value in environment(tmp_path / "marks").items():
        monkeypatch.setenv(name, value)


def is_alone_and_whole(server: Server, job: Job, *, attempts: int) -> None:
    done = server.wait(job)
    assert (done.state, done.attempts) == ("completed", attempts)
    assert done.result is not None
    assert b"".join(server.outputs.open(done.result.key).pieces)[4:8] == b"ftyp"
    assert done.report is not None
    assert done.report["output"] == done.result.key
    kinds = [event.kind for event in server.store.events(job.id)]
    assert kinds.count("completed") == 1
    assert len(server.store.due_notices()) == 1
    assert server.store.running() == []
    outputs = server.outputs
    assert isinstance(outputs, LocalOutputs)
    wait_for(lambda: list(outputs._work.iterdir()) == [])
    assert [file.key for file in outputs.keys()] == [done.result.key]  # noqa: SIM118  no dict


def die_at(label: str, url: str, directory: Path) -> None:
    process = start_server(url, directory, label=label, action="kill")
    assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize("label", ["before-accept-commit", "after-accept-commit"])
def test_killed_while_a_job_is_accepted(
    label: str, tmp_path: Path, open_store: Callable[..., JobStore]
) -> None:
    """The client got no answer and sends it again: one job, whether or not it had been kept."""
    url = str(tmp_path / "jobs.db")
    die_at(label, url, tmp_path)
    store = open_store(url)
    assert sum(store.counts().values()) == (label == "after-accept-commit")
    job, _ = store.submit(NEW)
    with running_server(store, tmp_path) as server:
        is_alone_and_whole(server, job, attempts=1)
    assert sum(store.counts().values()) == 1


@pytest.mark.parametrize("label", ["before-claim-commit", *MADE_AGAIN, *NOT_MADE_AGAIN, *ENDED])
def test_killed_on_the_way_of_a_job(
    label: str, tmp_path: Path, open_store: Callable[..., JobStore]
) -> None:
    """A clip that was kept is not made again: its job is completed with it."""
    url = str(tmp_path / "jobs.db")
    store = open_store(url)
    job, _ = store.submit(NEW)
    die_at(label, url, tmp_path)
    assert store.get(job.id).is_final == (label in ENDED)
    with running_server(store, tmp_path) as server:
        is_alone_and_whole(server, job, attempts=2 if label in MADE_AGAIN else 1)


def test_killed_on_postgres(
    postgres: Postgres, tmp_path: Path, open_store: Callable[..., JobStore]
) -> None:
    """There the lease of a process of this machine and boot that is gone is ended at once too."""
    url = postgres.empty_database()
    store = open_store(url)
    job, _ = store.submit(NEW)
    die_at("after-claim-commit", url, tmp_path)
    with running_server(store, tmp_path) as server:
        is_alone_and_whole(server, job, attempts=2)


@pytest.mark.parametrize("label", ["after-generate", "after-keep"])
def test_stopped_past_its_lease_and_woken_too_late(
    label: str, tmp_path: Path, open_store: Callable[..., JobStore]
) -> None:
    """The first server sleeps, the second makes the clip, the first wakes up: it changes nothing,
    and takes away what it had kept itself."""
    url = str(tmp_path / "jobs.db")
    store = open_store(url, lease_s=1.0)
    job, _ = store.submit(NEW)
    sleeper = start_server(url, tmp_path, label=label, action="stop", lease_s=1.0)
    try:
        wait_for(lambda: is_stopped(sleeper.pid))
        with running_server(store, tmp_path) as server:
            done = server.wait(job)
            assert (done.state, done.attempts) == ("completed", 2)
            events = store.events(job.id)
            os.kill(sleeper.pid, signal.SIGCONT)
            wait_for(lambda: not is_stopped(sleeper.pid))
            if label == "after-keep":
                wait_for(lambda: len(list(server.outputs.keys())) == 1)
            time.sleep(1.0)  # the sleeper has its chance
            assert store.get(job.id) == done
            assert store.events(job.id) == events
            is_alone_and_whole(server, job, attempts=2)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_gpu_process_ends_with_its_server(
    tmp_path: Path, open_store: Callable[..., JobStore]
) -> None:
    url = str(tmp_path / "jobs.db")
    store = open_store(url)
    job, _ = store.submit(does("hang"))
    server = start_server(url, tmp_path, label="never", action="kill")
    wait_for(lambda: store.get(job.id).step is not None)
    children = Path(f"/proc/{server.pid}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    assert len(pids) == 1
    server.kill()
    server.wait()
    wait_for(lambda: not is_alive(pids[0]), timeout_s=5)


def is_stopped(pid: int) -> bool:
    return state_of(pid) == "T"


def is_alive(pid: int) -> bool:
    return state_of(pid) not in ("Z", "")


def state_of(pid: int) -> str:
    """The letter of proc(5); nothing where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat[stat.rindex(")") + 2]
