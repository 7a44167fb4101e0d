"""Servers that tests share: one that asks for no key, and one that does."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.serve.harness import Running, running

KEY = "wf_test_key_of_the_environment_0123456789"


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """On the loopback, without keys."""
    with running(tmp_path_factory.mktemp("open")) as server:
        yield server


@pytest.fixture
def client(open_server: Running) -> Iterator[httpx2.Client]:
    with open_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a key of the environment, and room for more."""
    with running(tmp_path_factory.mktemp("locked"), api_key=KEY) as server:
        yield server
