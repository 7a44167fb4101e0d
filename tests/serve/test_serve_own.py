"""Our own face: plans, jobs, events that are replayed, files by ranges, health, metrics."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.harness import TINY, Running, running, wait_until
from wanfit.jobs.telemetry import AttemptEnded, ProcessEnded
from wanfit.outputs import LocalOutputs, Variant
from wanfit.serve.limits import BURST_S, MAX_CALLERS, Buckets


def submit(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/jobs", json={"prompt": "a blue star", **TINY, **fields})
    assert reply.status_code == 202, reply.text
    return dict(reply.json())


def sse(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events of a stream: id, event, and data as JSON."""
    event: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line == "" and "data" in event:
            yield {**event, "data": json.loads(event["data"])}
            event = {}
        elif name in ("id", "event", "data"):
            event[name] = value


class TestPlan:
    def test_it_says_what_a_clip_would_take_here(self, client: httpx2.Client) -> None:
        told = client.post("/v1/plan", json={"prompt": "x", **TINY}).json()
        assert told["fits"] is True
        assert told["settings"]["num_frames"] == 5
        assert told["elapsed_s"] > 0
        assert told["host_peak_bytes"] > 10**8
        assert told["machine"]["num_cores"] >= 1
        assert set(told["queue"]) == {"queued", "running", "expected_wait_s"}
        larger = client.post("/v1/plan", json={"num_frames": 81}).json()
        assert larger["elapsed_s"] > told["elapsed_s"]

    def test_what_does_not_fit_is_a_422_that_says_what_would(self, tmp_path: Path) -> None:
        """In the shape of each face; and a job is refused as the plan is."""
        with running(tmp_path, ram_bytes=1 << 30) as server, server.client() as client:
            large = {"prompt": "x", "size": "1280x1280", "num_frames": 121}
            for path, body in (
                ("/v1/plan", large), ("/v1/jobs", large), ("/run", {"input": large}),
                ("/v1/videos", large),
            ):  # fmt: skip
                reply = client.post(path, json=body)
                assert reply.status_code == 422, path
                told = reply.json()
                shortage = told.get("shortage") or told["error"]["shortage"]
                assert shortage["memory"] == "host"
                assert shortage["needed_bytes"] > shortage["budget_bytes"]
                assert any(advice["change"] for advice in shortage["advice"])
            assert server.store.counts()["queued"] == 0


class TestJobs:
    def test_a_job_tells_everything_that_is_known_of_it(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = submit(client, seed=5)
        assert (job["state"], job["percent"], job["video"]) == ("queued", 0, None)
        assert job["request"]["seed"] == 5
        assert job["queue"]["position"] == 0
        second = submit(client)
        assert second["queue"]["position"] == 1
        assert second["queue"]["expected_start"] >= job["queue"]["expected_start"]
        claim = open_server.begin()
        told = client.get(f"/v1/jobs/{job['id']}").json()
        assert (told["state"], told["percent"], told["stage"]) == ("running", 40.0, "denoise")
        open_server.finish(claim)
        told = client.get(f"/v1/jobs/{job['id']}").json()
        assert (told["state"], told["percent"]) == ("completed", 100.0)
        assert told["report"]["total_s"] == 1.5
        assert set(told["video"]["urls"]) == {"video", "thumbnail", "spritesheet"}
        assert "/secret" not in json.dumps(told)
        open_server.fail()
        error = client.get(f"/v1/jobs/{second['id']}").json()["error"]
        assert error["code"] == "worker_crashed"

    def test_an_idempotency_key_gives_the_first_job_again(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        headers = {"idempotency-key": "k1"}
        body = {"prompt": "x", **TINY}
        first = client.post("/v1/jobs", json=body, headers=headers)
        again = client.post("/v1/jobs", json=body, headers=headers)
        assert (first.status_code, again.status_code) == (202, 200)
        assert first.json()["id"] == again.json()["id"]
        other = client.post("/v1/jobs", json={**body, "seed": 1}, headers=headers)
        assert other.status_code == 422
        assert other.json()["error"]["code"] == "key_reused"
        open_server.finish()

    def test_pages_cancel_and_delete(self, open_server: Running, client: httpx2.Client) -> None:
        made = [submit(client)["id"] for _ in range(3)]
        page = client.get("/v1/jobs", params={"limit": 2}).json()
        assert [job["id"] for job in page["jobs"]] == made[:0:-1]
        assert page["has_more"] is True
        rest = client.get("/v1/jobs", params={"limit": 1, "after": made[1]}).json()
        assert [job["id"] for job in rest["jobs"]] == made[:1]
        assert client.post(f"/v1/jobs/{made[0]}/cancel").json()["state"] == "cancelled"
        assert client.delete(f"/v1/jobs/{made[1]}").status_code == 204
        assert client.get(f"/v1/jobs/{made[1]}").status_code == 404
        assert open_server.finish().id == made[2]
        key = open_server.store.get(made[2]).result
        assert key is not None
        client.delete(f"/v1/jobs/{made[2]}")
        assert open_server.hall.outputs.path(key.key) is None, "its files are gone too"

    @pytest.mark.parametrize(
        ("field", "value"),
        [("priority", "high"), ("priority", 101), ("timeout_s", 0), ("timeout_s", True),
         ("webhook", 5), ("webhook", "http://10.0.0.1/"), ("seed", "x")],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, client: httpx2.Client, field: str, value: object) -> None:
        reply = client.post("/v1/jobs", json={"prompt": "x", **TINY, field: value})
        assert reply.status_code == 400
        assert set(reply.json()["error"]) >= {"code", "message", "hint", "request_id"}

    def test_the_same_clip_comes_from_the_cache_where_that_is_on(self, tmp_path: Path) -> None:
        with running(tmp_path, cache=True) as server, server.client() as client:
            submit(client, seed=1)
            server.finish()
            again = submit(client, seed=1)
            assert (again["state"], again["cached"]) == ("completed", True)
            assert httpx2.get(again["video"]["urls"]["video"]).status_code == 200
            assert submit(client, seed=2)["state"] == "queued"


class TestEvents:
    def test_they_come_as_they_happen_and_end_with_the_job(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = submit(client)
        came: list[tuple[float, str]] = []

        def follow() -> None:
            with (
                open_server.client() as own,
                own.stream("GET", f"/v1/jobs/{job['id']}/events") as reply,
            ):
                assert reply.headers["content-type"].startswith("text/event-stream")
                for event in sse(reply.iter_lines()):
                    came.append((time.monotonic(), event["event"]))

        thread = threading.Thread(target=follow)
        thread.start()
        wait_until(lambda: len(came) == 1)
        began_s = time.monotonic()
        claim = open_server.begin()
        wait_until(lambda: came[-1][1] == "preview")
        assert came[-1][0] - began_s < 0.5, "it does not wait for the next look"
        open_server.finish(claim)
        thread.join(10)
        kinds = [kind for _, kind in came]
        assert kinds == ["queued", "started", "stage", "step", "preview", "completed"]

    def test_a_client_that_comes_back_hears_what_it_missed(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        """From the database, so after a restart of the server too."""
        job = submit(client)
        open_server.finish()
        url = f"/v1/jobs/{job['id']}/events"
        with client.stream("GET", url) as reply:
            everything = list(sse(reply.iter_lines()))
        assert [event["id"] for event in everything] == [
            str(seq) for seq in sorted(int(event["id"]) for event in everything)
        ]
        middle = everything[2]["id"]
        with client.stream("GET", url, headers={"last-event-id": middle}) as reply:
            assert list(sse(reply.iter_lines())) == everything[3:]
        preview = next(event for event in everything if event["event"] == "preview")
        assert preview["data"]["image"] == "data:image/jpeg;base64,AAAA"
        assert everything[-1]["data"]["percent"] == 100

    def test_a_job_that_is_deleted_ends_its_stream(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = submit(client)
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as reply:
            lines = reply.iter_lines()
            assert next(sse(lines))["event"] == "queued"
            with open_server.client() as other:
                other.delete(f"/v1/jobs/{job['id']}")
            assert [event["event"] for event in sse(lines)] in ([], ["cancelled"])


class TestFiles:
    @pytest.fixture
    def clip(self, open_server: Running, client: httpx2.Client) -> tuple[str, bytes]:
        """Path and bytes of a finished clip."""
        job = submit(client)["id"]
        open_server.finish()
        path = f"/v1/videos/{job}/content"
        return path, client.get(path).content

    def test_the_whole_is_marked_with_its_hash_for_ever(
        self, client: httpx2.Client, clip: tuple[str, bytes]
    ) -> None:
        path, data = clip
        reply = client.get(path)
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        assert reply.headers["etag"] == tag
        assert "immutable" in reply.headers["cache-control"]
        assert reply.headers["accept-ranges"] == "bytes"
        assert reply.headers["content-type"] == "video/mp4"
        assert int(reply.headers["content-length"]) == len(data)
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(data))
        for given in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            assert client.get(path, headers={"if-none-match": given}).status_code == 304
        assert client.get(path, headers={"if-none-match": '"x"'}).status_code == 200

    @pytest.mark.parametrize(
        ("asked", "start", "stop"),
        [("bytes=0-0", 0, 1), ("bytes=0-99", 0, 100), ("bytes=100-", 100, None),
         ("bytes=-50", -50, None), ("bytes=10-999999999", 10, None), ("bytes=-999999999", 0, None)],
    )  # fmt: skip
    def test_a_range_is_a_206_of_just_that(
        self, client: httpx2.Client, clip: tuple[str, bytes], asked: str,
        start: int, stop: int | None,
    ) -> None:  # fmt: skip
        path, data = clip
        reply = client.get(path, headers={"range": asked})
        assert reply.status_code == 206
        expected = data[start:stop]
        assert reply.content == expected
        first = len(data) + start if start < 0 else start
        last = first + len(expected) - 1
        assert reply.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"

    @pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=99999999-100000000"])
    def test_a_range_beyond_the_end_is_a_416(
        self, client: httpx2.Client, clip: tuple[str, bytes], asked: str
    ) -> None:
        path, data = clip
        reply = client.get(path, headers={"range": asked})
        assert reply.status_code == 416
        assert reply.headers["content-range"] == f"bytes */{len(data)}"

    @pytest.mark.parametrize(
        "asked", ["bytes=5-2", "bytes=0-1,5-6", "items=0-1", "bytes=a-b", "bytes=", "bytes=-", ""]
    )
    def test_a_range_that_is_none_gives_the_whole(
        self, client: httpx2.Client, clip: tuple[str, bytes], asked: str
    ) -> None:
        path, data = clip
        reply = client.get(path, headers={"range": asked})
        assert (reply.status_code, reply.content) == (200, data)

    def test_if_range_with_another_tag_gives_the_whole(
        self, client: httpx2.Client, clip: tuple[str, bytes]
    ) -> None:
        path, _ = clip
        tag = client.get(path).headers["etag"]
        headers = {"range": "bytes=0-9"}
        assert client.get(path, headers={**headers, "if-range": tag}).status_code == 206
        assert client.get(path, headers={**headers, "if-range": '"x"'}).status_code == 200

    def test_files_that_were_swept_are_gone(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = submit(client)["id"]
        result = open_server.finish().result
        assert result is not None
        open_server.hall.outputs.delete(result.key)
        assert client.get(f"/v1/videos/{job}/content").status_code == 404
        open_server.store.note_outputs([result.key], gone=True)
        assert client.get(f"/v1/videos/{job}/content").status_code == 410
        assert client.get(f"/v1/jobs/{job}").json()["output_gone"] is True


class TestLinks:
    def test_a_store_with_addresses_of_its_own_is_linked_to_by_them(self, tmp_path: Path) -> None:
        """As S3 is, which signs them itself (tests/outputs)."""

        class Elsewhere(LocalOutputs):
            def url(
                self, key: str, expires_s: int, variant: Variant = "video", name: str | None = None
            ) -> str | None:
                return f"https://bucket.example/{key}/{variant}?for={expires_s}&name={name}"

        with running(tmp_path) as server, server.client() as client:
            outputs = Elsewhere(tmp_path / "outputs")
            server.hall.links._outputs = outputs
            job = submit(client)["id"]
            done = server.finish()
            assert done.result is not None
            told = client.get(f"/status/{job}").json()["output"]["video_url"]
            place = f"https://bucket.example/{done.result.key}"
            assert told == f"{place}/video?for=3600&name={job}.mp4"


class TestHealth:
    def test_alive_and_ready(self, open_server: Running, client: httpx2.Client) -> None:
        assert client.get("/livez").json() == {"status": "alive"}
        reply = client.get("/readyz")  # the harness has no GPU process
        assert (reply.status_code, reply.json()) == (503, {"ready": False, "state": "failing"})
        open_server.hall.door.is_closed = True
        try:
            assert client.get("/readyz").json()["state"] == "draining"
            refused = client.post("/v1/jobs", json={"prompt": "x", **TINY})
            assert refused.status_code == 503
            assert client.get("/v1/jobs").status_code == 200, "what is there can still be seen"
        finally:
            open_server.hall.door.is_closed = False

    @pytest.fixture
    def counted(self, tmp_path: Path) -> Iterator[Running]:
        """A server of which nothing was counted yet."""
        with running(tmp_path) as server:
            yield server

    @staticmethod
    def value(server: Running, name: str, **labels: str) -> float:
        """Of the first series that has these labels, as Prometheus reads it; 0 where none has."""
        text = httpx2.get(f"{server.url}/metrics").text
        samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        return next(
            (found.value for found in samples if found.name == name
             and labels.items() <= found.labels.items()), 0.0,
        )  # fmt: skip

    def test_metrics_tell_of_jobs_and_of_what_the_plans_said(self, counted: Running) -> None:
        def value(name: str, **labels: str) -> float:
            return self.value(counted, name, **labels)

        metrics = counted.hall.metrics
        with counted.client() as client:
            job = submit(client)["id"]
            client.get(f"/v1/jobs/{job}")
        assert value("wanfit_queue_depth") == 1
        assert value("wanfit_queue_seconds") > 0
        done = counted.finish()
        for _ in range(2):  # told twice, counted once
            metrics.ended(done)
        metrics.observe(AttemptEnded(done, "worker_hung"))
        metrics.observe(ProcessEnded("worker_killed"))
        assert value("wanfit_job_outcomes_total", outcome="completed") == 1
        assert value("wanfit_stage_seconds_count", model="demo", stage="denoise") == 1
        assert value("wanfit_steps_per_second", model="demo") == 2 / 0.5
        labels = {"model": "demo", "stage": "denoise", "memory": "host"}
        assert value("wanfit_stage_peak_bytes", kind="measured", **labels) == 9
        assert value("wanfit_stage_peak_bytes", kind="predicted", **labels) == 10
        assert value("wanfit_attempts_lost_total", why="worker_hung") == 1
        assert value("wanfit_worker_deaths_total", code="worker_killed") == 1
        route = "/v1/jobs/{job_id}"
        assert value("wanfit_http_requests_total", route=route, status="200") == 1
        text = httpx2.get(f"{counted.url}/metrics").text
        assert job not in text, "ids would make endless series"

    def test_a_job_that_never_ran_counts_too(self, counted: Running) -> None:
        """Whoever ended it: here the client, while it waited."""
        with counted.client() as client:
            client.post(f"/v1/jobs/{submit(client)['id']}/cancel")
        labels = {"outcome": "cancelled"}
        wait_until(lambda: self.value(counted, "wanfit_job_outcomes_total", **labels) == 1, 5)

    def test_the_description_of_the_server_and_its_page_need_no_network(
        self, client: httpx2.Client
    ) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/run", "/v1/videos", "/v1/plan", "/v1/jobs/{job_id}/events"} <= set(paths)
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "/v1/videos" in page.text
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert "<script" not in page.text


class TestBuckets:
    def test_a_caller_has_its_rate_and_what_it_saved_up(self) -> None:
        now_s = 0.0
        buckets = Buckets(lambda: now_s)
        taken = [buckets.take("a", 2.0) for _ in range(int(2 * BURST_S) + 1)]
        assert taken == [0.0] * int(2 * BURST_S) + [0.5]
        now_s = 0.5
        assert buckets.take("a", 2.0) == 0
        assert buckets.take("a", 2.0) == 0.5
        assert buckets.take("b", 2.0) == 0, "another caller's bucket is another one"
        now_s = -100.0  # a clock that goes back takes nothing away
        assert buckets.take("a", 2.0) > 0

    def test_callers_that_are_silent_are_forgotten(self) -> None:
        buckets = Buckets(lambda: 0.0)
        for caller in range(3 * MAX_CALLERS):
            buckets.take(str(caller), 1.0)
        assert len(buckets._levels) <= MAX_CALLERS
