"""The real worker of RunPod's SDK against its queue on the loopback, on good days and bad ones."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from tests.runpod.workers import LONG, TINY, WAIT_S, WorkerProcess, error_of
from wanfit.testing.runpod_queue import MAX_BODY_BYTES, RunpodQueue

Warm = tuple[RunpodQueue, WorkerProcess]


def frames_of(text: str) -> int:
    with av.open(io.BytesIO(base64.b64decode(text)), "r") as container:
        return len(list(container.decode(video=0)))


def attempts_of(worker: WorkerProcess, job: str) -> int:
    return worker.said().count(f"job {job}: attempt ")


class TestGoodDays:
    def test_a_clip_by_both_shapes(self, warm: Warm) -> None:
        """Made, playable, and answered with all that design.md promises."""
        _, worker = warm
        older = {"action": "request", "params": {**TINY, "seed": 7}, "return_video": True}
        for job_input in ({**TINY, "seed": 7}, older):
            output = worker.make(job_input)["output"]
            assert output["status"] == "completed"
            assert frames_of(output["video_base64"]) == 5
            assert output["metadata"]["seed"] == 7
            assert output["metadata"]["bytes"] == len(base64.b64decode(output["video_base64"]))
            assert output["filename"].endswith(".mp4")
            assert output["report"]["total_s"] > 0
            assert str(worker.data) not in json.dumps(output["report"]["stages"])

    def test_the_same_id_gives_the_same_clip_and_makes_it_once(self, warm: Warm) -> None:
        queue, worker = warm
        job = queue.submit(TINY)
        first = queue.result(job, WAIT_S)
        queue.deliver_again(job)
        assert queue.result(job, WAIT_S, nth=2) == first
        assert attempts_of(worker, job) == 1

    def test_progress_comes_in_order_and_not_after_the_result(self, warm: Warm) -> None:
        """Of a job of seconds, with answers that are slow: the result waits for the last one."""
        queue, worker = warm
        queue.faults.slow_progress_s = 0.3
        try:
            job = queue.submit({**TINY, "num_inference_steps": 40})
            queue.result(job, WAIT_S)
            time.sleep(1.0)
        finally:
            queue.faults.slow_progress_s = 0.0
        posts = queue.posts_of(job)
        assert posts[-1].kind == "result"
        told = [post.body["output"] for post in posts if post.kind == "progress"]
        assert told
        assert [one["percent"] for one in told] == sorted(one["percent"] for one in told)
        moments = [post.at_s for post in posts if post.kind == "progress"]
        assert all(later - first > 0.9 for first, later in pairwise(moments))
        assert job in worker.said()

    def test_health_tells_models_verdicts_and_versions(self, warm: Warm) -> None:
        _, worker = warm
        output = worker.make({"action": "health"})["output"]
        models = {one["model"]: one for one in output["models"]}
        assert models["demo"]["usable"] is True
        assert "fits" in models["t2v-a14b"]
        assert output["versions"]["runpod"].startswith("1.")
        assert output["gpu_process"][0]["state"] in ("idle", "starting")
        assert str(Path.cwd()) not in json.dumps(output)

    def test_the_process_of_the_sdk_never_has_torch(self, warm: Warm) -> None:
        _, worker = warm
        assert "output" in worker.make({"action": "health"})
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "sqlite" in maps
        assert "libtorch" not in maps

    def test_pings_tell_the_job(self, warm: Warm) -> None:
        queue, worker = warm
        job = queue.submit({**TINY, "num_inference_steps": 40})
        queue.wait(lambda: any([job] == ping.get("job_id") for ping in queue.pings), WAIT_S)
        queue.result(job, WAIT_S)
        assert worker.process.poll() is None


class TestErrors:
    @pytest.mark.parametrize(
        ("job_input", "code"),
        [
            ({**TINY, "num_frames": 6}, "bad_frame_count"),
            ({**TINY, "nonsense": 1}, "bad_option"),
            ({**TINY, "model": "t2v-a14b"}, "weights_missing"),
            ({**TINY, "image_url": "http://169.254.169.254/latest"}, "bad_url"),
            ({"action": "dance"}, "bad_input"),
            ({"action": "status", "request_id": "never-was"}, "no_such_job"),
            ("text", "bad_input"),
            ([1], "bad_input"),
            (None, "bad_input"),
            ({"prompt": "a\u0000b"}, "bad_text"),
        ],
    )
    def test_is_a_string_with_code_message_hint_and_id(
        self, warm: Warm, job_input: Any, code: str
    ) -> None:
        queue, worker = warm
        job = queue.submit(job_input)
        error = error_of(queue.result(job, WAIT_S))
        assert error["code"] == code
        assert error["request_id"] == job
        assert f"job {job}" in worker.said()

    def test_half_an_s3_config_is_refused_before_the_work(self, warm: Warm) -> None:
        queue, _ = warm
        job = queue.submit(TINY, s3Config={"accessId": "x"})
        assert error_of(queue.result(job, WAIT_S))["code"] == "bad_input"

    def test_the_time_that_a_job_may_run_is_kept(self, warm: Warm) -> None:
        queue, _ = warm
        job = queue.submit(LONG, policy={"executionTimeout": 5000})
        began_s = time.monotonic()
        assert error_of(queue.result(job, WAIT_S))["code"] == "timed_out"
        assert time.monotonic() - began_s < 30


class TestStops:
    def test_a_running_job_stops_within_a_step_and_the_next_one_runs(self, warm: Warm) -> None:
        queue, worker = warm
        job = queue.submit(LONG)
        queue.wait(lambda: any(post.job_id == job for post in queue.posts), WAIT_S)
        queue.stop("never-was")
        queue.stop(job)
        began_s = time.monotonic()
        assert worker.make(TINY)["output"]["status"] == "completed"
        assert time.monotonic() - began_s < 15  # LONG takes half a minute
        assert not queue.posts_of(job, "result")
        assert f"job {job}: cancelled" in worker.said()


class TestBadDays:
    def test_a_refused_result_is_there_when_the_job_comes_again(self, warm: Warm) -> None:
        """The SDK tries three times and forgets it; the clip does not need to be made again."""
        queue, worker = warm
        queue.faults.refused_results = 3
        job = queue.submit(TINY)
        queue.wait(lambda: len(queue.posts_of(job, "result")) >= 3, WAIT_S)
        queue.deliver_again(job)
        assert queue.result(job, WAIT_S)["output"]["status"] == "completed"
        assert attempts_of(worker, job) == 1

    def test_a_body_that_is_too_large_for_the_platform(self, warm: Warm) -> None:
        """Refused with a 413, after which the SDK does not try again."""
        queue, worker = warm
        queue.faults.max_body_bytes = 1000
        job = queue.submit(TINY)
        try:
            queue.wait(lambda: bool(queue.posts_of(job, "result")), WAIT_S)
            assert {post.status for post in queue.posts_of(job, "result")} == {413}
        finally:
            queue.faults.max_body_bytes = MAX_BODY_BYTES
        queue.deliver_again(job)
        assert queue.result(job, WAIT_S)["output"]["status"] == "completed"
        assert attempts_of(worker, job) == 1

    def test_a_reply_that_got_lost_costs_no_second_clip(self, warm: Warm) -> None:
        queue, worker = warm
        queue.faults.lost_replies = 1
        job = queue.submit(TINY)
        queue.result(job, WAIT_S)
        queue.deliver_again(job)
        assert queue.result(job, WAIT_S, nth=2)["output"]["status"] == "completed"
        assert attempts_of(worker, job) == 1

    def test_storms_malformed_jobs_and_refused_pings(self, warm: Warm) -> None:
        """The worker goes on; a 429 makes the SDK wait for five seconds."""
        queue, worker = warm
        queue.faults.refuses_pings = True
        queue.faults.takes.extend([204] * 20 + [400] * 20 + [500] * 5 + [429])
        queue.faults.raw_takes.extend([b"{}", b"[]", b"nonsense", b"7", b'{"id": 5}'])
        try:
            assert worker.make(TINY)["output"]["status"] == "completed"
        finally:
            queue.faults.refuses_pings = False
        assert not queue.faults.takes
        assert not queue.faults.raw_takes

    def test_a_queue_that_vanishes_while_a_job_runs(self, warm: Warm) -> None:
        """The worker lives on, and has the clip when the job comes again."""
        queue, worker = warm
        job = queue.submit({**TINY, "num_inference_steps": 15})
        queue.wait(lambda: any(post.job_id == job for post in queue.posts), WAIT_S)
        queue.vanish()
        time.sleep(3.0)
        queue.come_back()
        queue.deliver_again(job)
        assert queue.result(job, WAIT_S)["output"]["status"] == "completed"
        assert attempts_of(worker, job) == 1

    def test_a_slow_take(self, warm: Warm) -> None:
        queue, worker = warm
        queue.faults.slow_take_s = 1.0
        try:
            assert worker.make(TINY)["output"]["status"] == "completed"
        finally:
            queue.faults.slow_take_s = 0.0


class TestEnds:
    def test_a_stop_at_the_start_and_a_job_delivered_after_sigterm(
        self, runpod_queue: RunpodQueue, tmp_path: Path
    ) -> None:
        """Nothing is loaded yet, and the stop is heard. At the end the SDK alone would drop the
        job: its poll was open when the signal came."""
        worker = WorkerProcess(runpod_queue, tmp_path / "data")
        try:
            stopped = runpod_queue.submit(LONG)
            runpod_queue.wait_taken(stopped)
            time.sleep(0.3)  # the SDK's task begins
            runpod_queue.stop(stopped)
            assert worker.make(TINY)["output"]["status"] == "completed"
            assert not runpod_queue.posts_of(stopped, "result")
            assert attempts_of(worker, stopped) <= 1
            runpod_queue.hold_s = 20.0
            time.sleep(2.5)  # the poll that is open now is held for long
            worker.terminate()
            time.sleep(0.5)
            job = runpod_queue.submit(TINY)
            assert runpod_queue.result(job, WAIT_S)["output"]["status"] == "completed"
            assert worker.wait() == 0
        finally:
            worker.kill()
        assert "told to stop" in worker.said()

    def test_a_running_job_is_made_to_its_end_and_two_are_held_at_once(
        self, runpod_queue: RunpodQueue, tmp_path: Path
    ) -> None:
        """With a concurrency of two: both were delivered, in a batch, and both are answered."""
        worker = WorkerProcess(runpod_queue, tmp_path / "data", WANFIT_CONCURRENCY="2")
        try:
            jobs = [runpod_queue.submit({**TINY, "num_inference_steps": 15}) for _ in range(2)]
            for job in jobs:
                runpod_queue.wait_taken(job)
            assert "job-take-batch" in runpod_queue.calls
            runpod_queue.wait(lambda: bool(runpod_queue.posts), WAIT_S)
            worker.terminate()
            for job in jobs:
                assert runpod_queue.result(job, WAIT_S)["output"]["status"] == "completed"
            left = runpod_queue.submit(TINY)
            assert worker.wait() == 0
        finally:
            worker.kill()
        assert not runpod_queue.posts_of(left)

    def test_a_job_of_a_killed_worker_is_made_by_the_next(
        self, runpod_queue: RunpodQueue, tmp_path: Path
    ) -> None:
        """On the same disk: what was left is given up, and the job that comes again is made."""
        first = WorkerProcess(runpod_queue, tmp_path / "data")
        job = runpod_queue.submit({**TINY, "num_inference_steps": 15})
        runpod_queue.wait(lambda: bool(runpod_queue.posts), WAIT_S)
        first.kill()
        second = WorkerProcess(runpod_queue, tmp_path / "data")
        try:
            runpod_queue.deliver_again(job)
            assert runpod_queue.result(job, WAIT_S)["output"]["status"] == "completed"
        finally:
            second.kill()

    def test_a_gpu_process_beyond_repair_asks_for_another_worker(
        self, runpod_queue: RunpodQueue, tmp_path: Path
    ) -> None:
        """Its torch cannot be imported, however often it is started."""
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart is missing')")
        path = f"{tmp_path / 'broken'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        worker = WorkerProcess(runpod_queue, tmp_path / "data", PYTHONPATH=path)
        try:
            body = worker.make(TINY)
            assert body.pop("stopPod") is True
            assert error_of(body)["code"] == "gpu_error"
            assert "libcudart is missing" in worker.said()
        finally:
            worker.kill()
