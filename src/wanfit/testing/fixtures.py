"""Fixtures for pytest: `pytest_plugins = ["wanfit.testing.fixtures"]` in a conftest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from wanfit.testing.runpod_queue import RunpodQueue


@pytest.fixture
def runpod_queue() -> Iterator[RunpodQueue]:
    """A queue of its own for the test; give a worker's process `runpod_queue.environment()`."""
    with RunpodQueue() as queue:
        yield queue
