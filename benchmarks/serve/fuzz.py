"""The long form of tests/serve/test_serve_fuzz.py: does anything make the server fail?

    python -m benchmarks.serve.fuzz [--bodies 10000] [--examples 100]

Sends bodies made by hypothesis, and requests that schemathesis makes of our OpenAPI, to a server on
the loopback whose jobs nobody makes. Prints what was answered how often; ends with 1 at the first
5xx, traceback, or answer that the OpenAPI does not describe.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from tests.serve.bodies import Sent, bodies
from tests.serve.harness import Running, running
from tests.serve.test_serve_fuzz import CHECKED, IDLE, LEAKS, WITHOUT_LIMITS

Answers = Counter[tuple[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=100, help="of each route")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        running(Path(directory), workers=(IDLE,), **WITHOUT_LIMITS) as server,
        server.client() as client,
    ):
        began_s = time.monotonic()
        answers = send_bodies(client, asked.bodies)
        print(f"{answers.total()} bodies in {time.monotonic() - began_s:.0f} s")
        for (path, status), count in sorted(answers.items()):
            print(f"  {path:14} {status}  {count}")
        began_s = time.monotonic()
        cases = send_cases(server, asked.examples)
        print(f"{cases.total()} requests of schemathesis in {time.monotonic() - began_s:.0f} s")
        by_status = Counter[int]()
        for (_, status), count in cases.items():
            by_status[status] += count
        print("  " + ", ".join(f"{status}: {count}" for status, count in sorted(by_status.items())))
    print("no 5xx, no traceback, nothing that the OpenAPI does not describe")


def send_bodies(client: httpx2.Client, count: int) -> Answers:
    """Answers by path and status."""
    answers: Answers = Counter()

    @given(sent=bodies())
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def send(sent: Sent) -> None:
        headers = {b"content-type": sent.content_type.encode("latin-1")}
        reply = client.post(sent.path, content=sent.content, headers=headers)
        answers[sent.path, reply.status_code] += 1
        assert reply.status_code < 500, (sent, reply.text)
        assert not LEAKS.search(reply.text), (sent, reply.text)
        reply.json()

    send()
    return answers


def send_cases(server: Running, examples: int) -> Answers:
    """Likewise, of every route but /runsync, which would wait."""
    answers: Answers = Counter()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path="/runsync")
    for operation in [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def send(case: schemathesis.Case[Any]) -> None:
            reply = case.call_and_validate(checks=CHECKED)
            answers[case.path, reply.status_code] += 1

        send()
    return answers


if __name__ == "__main__":
    main()
