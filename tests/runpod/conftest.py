"""A queue of RunPod's on the loopback, and workers that take jobs from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runpod.workers import WorkerProcess
from wanfit.testing.fixtures import runpod_queue  # noqa: F401  for the tests here
from wanfit.testing.runpod_queue import RunpodQueue


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunpodQueue, WorkerProcess]]:
    """A queue and its worker, whose GPU process is there, for tests that leave both as they are."""
    with RunpodQueue() as queue:
        worker = WorkerProcess(queue, tmp_path_factory.mktemp("warm") / "data")
        try:
            yield queue, worker
        finally:
            worker.kill()
