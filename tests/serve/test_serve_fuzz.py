"""Whatever is sent, the server neither fails nor shows its inside: by schemathesis and hypothesis.

A short form of `python -m benchmarks.serve.fuzz`, which sends 10,000 bodies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.bodies import Sent, bodies
from tests.serve.harness import Running, running
from wanfit.jobs.telemetry import WorkerStatus
from wanfit.settings import Limits

LEAKS = re.compile(r"Traceback|File \\?\"|site-packages|sqlalchemy", re.IGNORECASE)
WITHOUT_LIMITS: dict[str, Any] = {
    "max_queued": 10**6,
    "limits": Limits(requests_per_s=1e6, jobs_per_minute=1e9, max_queued=10**6),
}
EXAMPLES = 5  # of each route
IDLE = WorkerStatus(0, "idle", 1, "cpu", None, 0, None, None)
CHECKED: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With room for all that is accepted, which nobody makes."""
    directory = tmp_path_factory.mktemp("fuzzed")
    with running(directory, workers=(IDLE,), **WITHOUT_LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def http(fuzzed: Running) -> Iterator[httpx2.Client]:
    with fuzzed.client() as client:
        yield client


@given(sent=bodies())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_no_body_makes_the_server_fail(http: httpx2.Client, sent: Sent) -> None:
    """Not a 5xx, not a line of its code, and always JSON with a request id."""
    headers = {b"content-type": sent.content_type.encode("latin-1")}
    reply = http.post(sent.path, content=sent.content, headers=headers)
    assert reply.status_code < 500, (sent, reply.text)
    assert not LEAKS.search(reply.text), (sent, reply.text)
    assert reply.headers["x-request-id"]
    reply.json()


def test_the_server_answers_as_it_describes(fuzzed: Running) -> None:
    """Statuses, content types and bodies are those of our OpenAPI, route by route.

    Without /runsync, which waits for a job that nobody makes.
    """
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json").exclude(path="/runsync")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 20
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
        def check(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(checks=CHECKED)

        check()
