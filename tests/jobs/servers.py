"""A supervisor with a fake engine: here, or in a process that ends or stops at a labelled point.

    python -m tests.jobs.servers URL DIRECTORY LABEL ACTION LEASE_S

runs one until it is killed. At LABEL the process does ACTION to itself: "kill" or "stop".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.jobs.fake_gpu import MARKS
from tests.jobs.samples import new_job
from wanfit.jobs.attempt import Patience
from wanfit.jobs.crash_point import crash_point, set_crash_hook
from wanfit.jobs.job import Job, NewJob
from wanfit.jobs.store import JobStore
from wanfit.jobs.supervisor import Supervisor
from wanfit.jobs.telemetry import Observation
from wanfit.jobs.wire import Engine
from wanfit.outputs import LocalOutputs, OutputStore, Retention

ROOT = Path(__file__).parents[2]
FAKE = "tests.jobs.fake_gpu"
WAIT_S = 60.0  # for anything, on a busy machine
PATIENCE = Patience(hang_s=30.0, cancel_s=10.0, beat_s=0.2, news_s=0.05, keep_s=30.0)


def wait_for(what: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.02)


def does(prompt: str, **options: Any) -> NewJob:
    """A job that makes the fake engine do what its prompt says."""
    return new_job(request={"prompt": prompt, "model": "demo", "seed": 1}, **options)


def outputs_in(directory: Path) -> LocalOutputs:
    return LocalOutputs(directory / "outputs", Retention(min_free_bytes=0))


@dataclass
class Server:
    """What runs in `running_server`."""

    store: JobStore
    outputs: OutputStore
    supervisor: Supervisor
    seen: list[Observation] = field(default_factory=list)

    def submit(self, prompt: str, **options: Any) -> Job:
        return self.store.submit(does(prompt, **options))[0]

    def wait(self, job: Job) -> Job:
        """The job in its final state."""
        wait_for(lambda: self.store.get(job.id).is_final)
        return self.store.get(job.id)

    def wait_until_it_runs(self, job: Job) -> None:
        wait_for(lambda: self.store.get(job.id).step is not None)

    def pid(self) -> int:
        """Of the GPU process, once there is one that is ready."""
        wait_for(lambda: self.supervisor.status()[0].device)
        (status,) = self.supervisor.status()
        assert status.pid is not None
        return status.pid


@contextmanager
def running_server(
    store: JobStore,
    directory: Path,
    *,
    outputs: OutputStore | None = None,
    patience: Patience = PATIENCE,
    module: str = FAKE,
    grace_s: float = 0.0,
) -> Iterator[Server]:
    seen: list[Observation] = []
    kept = outputs or outputs_in(directory)
    supervisor = Supervisor(
        store,
        kept,
        [Engine()],
        log_dir=directory / "logs",
        observe=seen.append,
        patience=patience,
        module=module,
    )
    supervisor.start()
    try:
        yield Server(store, kept, supervisor, seen)
    finally:
        supervisor.stop(grace_s)


def start_server(
    url: str, directory: Path, *, label: str, action: str, lease_s: float = 30.0
) -> subprocess.Popen[bytes]:
    """The same in a process of its own, that meets `action` at `label`."""
    words = (url, str(directory), label, action, str(lease_s))
    return subprocess.Popen([sys.executable, "-m", "tests.jobs.servers", *words], cwd=ROOT)


def environment(marks: Path) -> dict[str, str]:
    """What the processes of a test need."""
    return {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", MARKS: str(marks)}


def main() -> None:
    url, directory, label, action = sys.argv[1:5]
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]
    met = False

    def hook(passed: str) -> None:
        nonlocal met
        if passed == label and not met:
            met = True
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # another thread takes the signal: not a step further meanwhile

    set_crash_hook(hook)
    # Points within OutputStore.keep: everything is written and synced; it has its name.
    appear = LocalOutputs._appear

    def labelled(self: LocalOutputs, folder: Path, final: Path) -> None:
        crash_point("before-rename")
        appear(self, folder, final)
        crash_point("after-rename")

    LocalOutputs._appear = labelled  # type: ignore[method-assign]
    store = JobStore(url, lease_s=float(sys.argv[5]))
    with running_server(store, Path(directory)) as server:
        if label.endswith("accept-commit"):
            server.submit("make", idempotency_key="k", webhook="https://example.org")
        signal.pause()


if __name__ == "__main__":
    main()
