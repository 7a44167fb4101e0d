"""The RunPod face, as a client of a RunPod endpoint uses it: paths, states, bodies, limits."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.serve.harness import TINY, Running

INPUT = {"prompt": "a blue star", "seed": 7, **TINY}


def run(client: httpx2.Client, path: str = "/run", **body: Any) -> dict[str, Any]:
    reply = client.post(path, json={"input": INPUT, **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def status(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    reply = client.get(f"/status/{job_id}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, format="PNG")
    return data.getvalue()


class TestFlow:
    def test_a_job_goes_from_the_queue_to_its_clip(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        """IN_QUEUE, IN_PROGRESS, COMPLETED; times in ms; and the address of a clip that plays."""
        accepted = run(client)
        assert accepted["id"].endswith("-u1")
        assert accepted["status"] == "IN_QUEUE"
        assert accepted["queue"]["position"] == 0
        waiting = status(client, accepted["id"])
        assert waiting["status"] == "IN_QUEUE"
        assert "delayTime" not in waiting
        assert waiting["queue"]["expected_finish"] > waiting["queue"]["expected_start"]

        claim = open_server.begin()
        running = status(client, accepted["id"])
        assert running["status"] == "IN_PROGRESS"
        assert running["output"] == {"percent": 40.0, "stage": "denoise", "step": 1, "steps": 2}

        open_server.finish(claim)
        done = status(client, accepted["id"])
        assert done["status"] == "COMPLETED"
        assert isinstance(done["delayTime"], int)
        assert isinstance(done["executionTime"], int)
        output = done["output"]
        assert output["request_id"] == accepted["id"]
        assert output["status"] == "completed"
        assert output["filename"] == f"{accepted['id']}.mp4"
        assert output["metadata"]["seed"] == 7
        assert output["report"]["total_s"] == 1.5
        assert "secret" not in json.dumps(done), "paths of this machine are nobody's business"
        clip = httpx2.get(output["video_url"])
        assert clip.content[4:8] == b"ftyp"
        assert len(clip.content) == output["metadata"]["bytes"]

    def test_under_an_endpoint_it_is_the_same_server(self, client: httpx2.Client) -> None:
        accepted = run(client, "/v2/my-endpoint/run")
        reply = client.get(f"/v2/other/status/{accepted['id']}")
        assert reply.json()["status"] == "IN_QUEUE"
        assert client.post(f"/v2/x/cancel/{accepted['id']}").json()["status"] == "CANCELLED"

    def test_runsync_answers_with_the_clip_or_says_that_it_goes_on(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        body = {"input": INPUT}
        waiting = client.post("/runsync", params={"wait": 1000}, json=body).json()
        assert waiting["id"].startswith("sync-")
        assert waiting["status"] == "IN_QUEUE"
        open_server.finish()
        assert status(client, waiting["id"])["status"] == "COMPLETED"

    def test_a_clip_in_base64_only_where_it_was_asked_for(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = run(client, input={**INPUT, "return_video": True})
        open_server.finish()
        output = status(client, job["id"])["output"]
        assert "video_url" not in output
        assert base64.b64decode(output["video_base64"])[4:8] == b"ftyp"

    def test_a_failure_is_a_string_that_holds_json(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = run(client)
        open_server.fail()
        told = status(client, job["id"])
        assert told["status"] == "FAILED"
        error = json.loads(told["error"])
        assert error == {
            "code": "worker_crashed", "message": "It broke", "hint": "Try less",
            "request_id": job["id"],
        }  # fmt: skip

    def test_an_attempt_that_took_too_long_is_timed_out(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        job = run(client, policy={"executionTimeout": 5000, "ttl": 60_000})
        kept = open_server.store.get(job["id"])
        assert kept.timeout_s == 5
        assert kept.deadline_s is not None
        assert 50 < kept.deadline_s - kept.created_s <= 60
        open_server.fail(code="timed_out")
        assert status(client, job["id"])["status"] == "TIMED_OUT"

    def test_low_priority_goes_last(self, open_server: Running, client: httpx2.Client) -> None:
        low = run(client, policy={"lowPriority": True})
        high = run(client)
        assert open_server.finish().id == high["id"]
        assert open_server.finish().id == low["id"]

    def test_cancel(self, open_server: Running, client: httpx2.Client) -> None:
        """Of a job that waits, and of one that runs, whose worker hears of it."""
        job = run(client)
        assert client.post(f"/cancel/{job['id']}").json() == {
            "id": job["id"], "status": "CANCELLED",
        }  # fmt: skip
        assert status(client, job["id"])["status"] == "CANCELLED"
        job = run(client)
        claim = open_server.begin()
        assert client.post(f"/cancel/{job['id']}").json()["status"] == "CANCELLED"
        assert open_server.store.heartbeat(claim) is True
        open_server.store.cancelled(claim)
        assert status(client, job["id"])["status"] == "CANCELLED"

    def test_a_retry_keeps_its_id_and_its_request(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        """The job that failed stays as it is; its id leads to the newest retry."""
        job = run(client)
        refused = client.post(f"/retry/{job['id']}")
        assert refused.status_code == 400
        open_server.fail()
        again = client.post(f"/retry/{job['id']}").json()
        assert again == {"id": job["id"], "status": "IN_QUEUE"}
        assert client.post(f"/retry/{job['id']}").status_code == 400, "it waits already"
        done = open_server.finish()
        assert done.request["seed"] == 7
        assert done.request == open_server.store.get(job["id"]).request
        told = status(client, job["id"])
        assert (told["id"], told["status"]) == (job["id"], "COMPLETED")

    def test_purge_takes_what_waits(self, open_server: Running, client: httpx2.Client) -> None:
        jobs = [run(client)["id"] for _ in range(3)]
        claim = open_server.begin()
        assert client.post("/purge-queue").json() == {"removed": 2, "status": "completed"}
        assert [status(client, job)["status"] for job in jobs] == [
            "IN_PROGRESS", "CANCELLED", "CANCELLED",
        ]  # fmt: skip
        open_server.finish(claim)

    def test_health_counts(self, open_server: Running, client: httpx2.Client) -> None:
        before = client.get("/health").json()["jobs"]
        run(client)
        after = client.get("/health").json()
        assert after["jobs"]["inQueue"] == before["inQueue"] + 1
        assert set(after["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}
        assert {"idle", "running"} <= set(after["workers"])
        open_server.finish()
        assert client.get("/health").json()["jobs"]["completed"] == before["completed"] + 1


class TestStream:
    def test_it_gives_each_event_once_and_the_clip_at_the_end(
        self, open_server: Running, client: httpx2.Client
    ) -> None:
        """The SDK's loop: it ends when a final state comes with nothing to tell."""
        job = run(client)
        open_server.finish()
        first = client.get(f"/stream/{job['id']}").json()
        assert first["status"] == "COMPLETED"
        outputs = [item["output"] for item in first["stream"]]
        assert [output.get("kind") for output in outputs] == ["stage", "step", "preview", None]
        assert outputs[-1]["video_url"]
        assert client.get(f"/stream/{job['id']}").json() == {"status": "COMPLETED", "stream": []}


class TestInput:
    @pytest.mark.parametrize(
        "given",
        [
            {"image": base64.b64encode(png()).decode()},
            {"image_base64": base64.b64encode(png()).decode()},
            {"reference_image_base64": "data:image/png;base64," + base64.b64encode(png()).decode()},
            {"image_url": "data:image/png;base64," + base64.b64encode(png()).decode()},
        ],
    )
    def test_a_picture_under_any_of_its_names(
        self, open_server: Running, client: httpx2.Client, given: dict[str, str]
    ) -> None:
        job = run(client, input={**INPUT, **given})
        kept = open_server.store.image(job["id"])
        assert kept is not None
        assert Image.open(io.BytesIO(kept)).getpixel((0, 0)) == (255, 0, 0)
        client.post(f"/cancel/{job['id']}")

    def test_the_older_shape(self, open_server: Running, client: httpx2.Client) -> None:
        """It asks for a clip, and then for its status, by a job of its own."""
        params = {"prompt": "a red ring", "size": "64*64", "frame_num": 5, "sample_steps": 2}
        job = run(client, input={"action": "request", "params": params, "return_video": True})
        open_server.finish()
        assert "video_base64" in status(client, job["id"])["output"]

        asking = {"action": "status", "params": {"request_id": job["id"]}}
        at_once = client.post("/runsync", json={"input": asking}).json()
        assert at_once["status"] == "COMPLETED"
        assert at_once["output"]["request_id"] == job["id"]
        assert at_once["output"]["status"] == "completed"
        later = run(client, input=asking)
        assert status(client, later["id"])["output"]["status"] == "completed"

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({}, "bad_input"),
            ({"input": {}}, "bad_input"),
            ({"input": "x"}, "bad_input"),
            ({"input": {"prompt": "x", "colour": 1}}, "bad_option"),
            ({"input": {"size": "64x64"}}, "bad_option"),
            ({"input": {"prompt": "x", "frames": 6}}, "bad_frame_count"),
            ({"input": {"prompt": "x", "size": "65x64"}}, "bad_size"),
            ({"input": {"prompt": "x", "model": "sora-2"}}, "unknown_model"),
            ({"input": {"prompt": "x", "image": "!"}}, "bad_image"),
            ({"input": {"prompt": "x", "image": "aaaa"}}, "bad_image"),
            ({"input": {"prompt": "x", "image": "aaaa", "image_url": "aaaa"}}, "bad_image"),
            ({"input": {"prompt": "x", "image_url": "http://127.0.0.1/x.png"}}, "bad_url"),
            ({"input": {"action": "reboot"}}, "bad_input"),
            ({"input": {"action": "status", "params": {}}}, "bad_input"),
            ({"input": {"prompt": "x"}, "policy": {"ttl": 1}}, "bad_option"),
            ({"input": {"prompt": "x"}, "policy": "fast"}, "bad_input"),
            ({"input": {"prompt": "x"}, "webhook": "http://169.254.169.254/"}, "bad_url"),
            ({"input": {"prompt": "x"}, "s3Config": {"bucketName": "b"}}, "unsupported"),
        ],
    )
    def test_what_is_wrong_is_said_at_once(
        self, client: httpx2.Client, body: dict[str, Any], code: str
    ) -> None:
        """400, with the error as a string of JSON, and nothing in the queue."""
        before = client.get("/health").json()["jobs"]["inQueue"]
        reply = client.post("/run", json=body)
        assert reply.status_code == 400, reply.text
        error = json.loads(reply.json()["error"])
        assert error["code"] == code
        assert error["request_id"] == reply.headers["x-request-id"]
        assert client.get("/health").json()["jobs"]["inQueue"] == before

    def test_a_model_without_weights_is_said_at_once(self, client: httpx2.Client) -> None:
        reply = client.post("/run", json={"input": {"prompt": "x", "model": "t2v-a14b"}})
        assert reply.status_code == 404
        assert json.loads(reply.json()["error"])["code"] == "weights_missing"

    def test_the_wait_of_runsync_is_runpod_s(self, client: httpx2.Client) -> None:
        reply = client.post("/runsync", params={"wait": 999}, json={"input": INPUT})
        assert reply.status_code == 400
        assert "wait" in reply.json()["error"]
