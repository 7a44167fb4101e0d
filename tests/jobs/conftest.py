"""Databases for jobs: SQLite files, and a real Postgres where this machine has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs.postgres import Postgres, running_postgres, why_not
from wanfit.jobs.store import JobStore

DATABASES = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server of this test session; skips with the reason where there can be none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_postgres() as server:
        yield server


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "jobs.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.empty_database()


@pytest.fixture
def open_store() -> Iterator[Callable[..., JobStore]]:
    """JobStore, closed at the end of the test."""
    stores: list[JobStore] = []

    def open_one(*args: object, **options: object) -> JobStore:
        stores.append(JobStore(*args, **options))  # type: ignore[arg-type]
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(database_url: str, open_store: Callable[..., JobStore]) -> JobStore:
    """An empty store in each kind of database."""
    return open_store(database_url)
