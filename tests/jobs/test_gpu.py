"""The whole way with the demo model: warm, cancelled within a step, killed and warm again."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import av
import pytest
from PIL import Image

from tests.jobs.samples import new_job
from tests.jobs.servers import Server, environment, running_server, wait_for
from wanfit.jobs.job import Job
from wanfit.jobs.process import MODULE
from wanfit.jobs.store import JobStore
from wanfit.plan.machine import read_machine
from wanfit.plan.planner import make_plan
from wanfit.plan.show import plan_json
from wanfit.request import VideoRequest, resolve
from wanfit.service import DEMO_DIRECTORY

SMALL = {
    "prompt": "a small red circle moves to the right",
    "width": 64,
    "height": 64,
    "num_frames": 5,
    "num_inference_steps": 4,
    "seed": 7,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here: torch is imported once, and once more after the kill."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")  # for a tiny clip, threads only wait for each other
        store = JobStore(str(folder / "jobs.db"))
        with running_server(store, folder, module=MODULE) as running:
            yield running
        store.close()


def submit(server: Server, image: bytes | None = None, **options: Any) -> Job:
    request = VideoRequest.parse({**SMALL, **options})
    machine = read_machine(weights=DEMO_DIRECTORY)
    planned = make_plan(
        resolve(request), machine, with_image=image is not None, weights_precision="bf16"
    )
    plan = plan_json(planned)
    new = new_job(
        request=request.model_dump(exclude_none=True),
        plan=plan,
        expected_s=plan["elapsed_s"],
        image=image,
    )
    return server.store.submit(new)[0]


def frames_of(server: Server, job: Job) -> list[bytes]:
    assert job.result is not None
    data = b"".join(server.outputs.open(job.result.key).pieces)
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def test_a_clip_and_the_same_clip_again_from_the_warm_process(server: Server) -> None:
    first, second = (server.wait(submit(server)) for _ in range(2))
    assert (first.state, first.error) == ("completed", None)
    frames = frames_of(server, first)
    assert len(frames) == 5
    assert frames_of(server, second) == frames
    assert first.report is not None
    assert [stage["stage"] for stage in first.report["stages"]] == ["text", "denoise", "decode"]
    assert server.supervisor.status()[0].restarts == 0
    percents = [event.percent for event in server.store.events(first.id)]
    assert percents == sorted(percents)
    assert percents[-1] == 100.0


def test_a_first_frame_is_used(server: Server) -> None:
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "yellow").save(png, "PNG")
    done = server.wait(submit(server, image=png.getvalue()))
    assert (done.state, done.error) == ("completed", None)
    assert done.report is not None
    assert "image" in [stage["stage"] for stage in done.report["stages"]]


def test_a_refusal_of_the_engine_is_the_jobs_error(server: Server) -> None:
    job, _ = server.store.submit(new_job(request={**SMALL, "num_frames": 6}))
    done = server.wait(job)
    assert done.state == "failed"
    assert done.error is not None
    assert done.error.code == "bad_frame_count"
    assert server.supervisor.status()[0].restarts == 0


def test_a_cancel_takes_effect_within_one_step(server: Server) -> None:
    job = submit(server, num_inference_steps=1000)
    server.wait_until_it_runs(job)
    pid = server.pid()
    before = server.store.get(job.id).step or 0
    began_s = time.monotonic()
    server.store.cancel(job.id)
    ended = server.wait(job)
    took_s = time.monotonic() - began_s
    assert ended.state == "cancelled"
    started_s = ended.started_s or 0.0
    step_s = (time.time() - took_s - started_s) / max(1, before)
    # One step, the supervisor's turn, the last write; and the event of the step before.
    assert took_s < step_s + 1.0
    assert server.pid() == pid
    assert server.wait(submit(server)).state == "completed"


def test_a_killed_process_is_warm_again_and_makes_the_same_clip(server: Server) -> None:
    whole = server.wait(submit(server, num_inference_steps=20))
    job = submit(server, num_inference_steps=20)
    server.wait_until_it_runs(job)
    os.kill(server.pid(), signal.SIGKILL)
    done = server.wait(job)
    assert (done.state, done.attempts) == ("completed", 2)
    assert frames_of(server, done) == frames_of(server, whole)
    wait_for(lambda: server.supervisor.status()[0].state == "idle")
