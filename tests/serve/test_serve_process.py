"""The whole server as a process of its own: it makes clips, drains, and comes back."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import av
import httpx2
import pytest
import standardwebhooks
from PIL import Image

from tests.serve.harness import TINY, wait_until
from tests.serve.test_serve_own import sse

SERVE = [sys.executable, "-c", "from wanfit.cli import main; main()", "serve", "--port", "0"]
READY_S = 60.0  # a GPU process imports torch, on two busy cores


class Process:
    """`wanfit serve` with its own data, on a free port; it ends with the block at the latest."""

    def __init__(self, data: Path, *options: str, **variables: str) -> None:
        self.data = data
        environment = {
            **os.environ, "WANFIT_DATA": str(data), "WANFIT_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",  # threads that wait for each other, where other tests run
            **variables,
        }  # fmt: skip
        self.log = (data.parent / f"{data.name}.log").open("w+b")
        self.process = subprocess.Popen(
            [*SERVE, *options], env=environment, stdout=subprocess.DEVNULL, stderr=self.log
        )
        wait_until(lambda: "serves at" in self.said() or self.process.poll() is not None)
        self.url = self.said().partition("serves at ")[2].partition("\n")[0]

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def stop(self, number: int = signal.SIGTERM, wait_s: float = 60.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(signal.SIGKILL)
        self.log.close()


class Receiver:
    """A server on the loopback that keeps what it is told."""

    def __init__(self) -> None:
        heard = self.heard = list[tuple[dict[str, str], bytes]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                heard.append((dict(self.headers.items()), content))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.address}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Process]:
    """With its GPU process warm, and one address of this network that it may ask."""
    data = tmp_path_factory.mktemp("server") / "data"
    with Process(data, WANFIT_ALLOWED_TARGETS=receiver.address) as process:
        with process.client() as client:
            wait_until(lambda: client.get("/readyz").json()["state"] == "ready", READY_S)
        yield process


def frames_of(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return len(list(container.decode(video=0)))


class TestClips:
    def test_a_clip_by_each_face(self, server: Process) -> None:
        """Asked for at once, made by one GPU process, and playable."""
        with server.client() as client:
            fields = {"prompt": "a blue star", **TINY}
            own = client.post("/v1/jobs", json=fields).json()["id"]
            form = {name: str(value) for name, value in fields.items()}
            openai = client.post("/v1/videos", data=form).json()["id"]
            done = client.post("/runsync", json={"input": fields}).json()
            assert done["status"] == "COMPLETED", done
            url = done["output"]["video_url"]
            assert frames_of(client.get(url).content) == 5
            for job in (own, openai):
                told = client.get(f"/v1/jobs/{job}").json()
                assert told["state"] == "completed", told
                assert frames_of(client.get(f"/v1/videos/{job}/content").content) == 5
            assert done["output"]["report"]["plan"]["fits"] is True
            line = 'wanfit_job_outcomes_total{code="",outcome="completed"} 3.0'
            wait_until(lambda: line in client.get("/metrics").text)

    def test_the_process_that_answers_never_has_torch(self, server: Process) -> None:
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "sqlite" in maps
        assert "libtorch" not in maps

    def test_events_come_from_the_gpu_process(self, server: Process) -> None:
        """Those of a clip this small come faster than they are written down, so not every one."""
        with server.client() as client:
            fields = {"prompt": "a red ring", **TINY, "num_inference_steps": 3}
            job = client.post("/v1/jobs", json=fields).json()["id"]
            with client.stream("GET", f"/v1/jobs/{job}/events") as reply:
                events = list(sse(reply.iter_lines()))
            kinds = [event["event"] for event in events]
            assert kinds[:2] == ["queued", "started"]
            assert kinds[-1] == "completed"
            assert {"stage", "step", "preview"} <= set(kinds)
            preview = next(event for event in events if event["event"] == "preview")
            head, _, picture = preview["data"]["image"].partition(",")
            assert head == "data:image/jpeg;base64"
            with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                assert image.size == (4, 4)  # the latents' of 64x64

    def test_a_webhook_hears_the_end_signed(self, server: Process, receiver: Receiver) -> None:
        """By Standard Webhooks' own library, with the secret that the command prints; of a RunPod
        job it is RunPod's status, of another one an event."""
        secret = subprocess.run(
            [*SERVE[:-3], "keys", "webhooks", "--data", str(server.data)],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        with server.client() as client:
            fields = {"prompt": "a red ring", **TINY}
            body = {"input": fields, "webhook": receiver.url}
            first = client.post("/run", json=body).json()["id"]
            wait_until(lambda: len(receiver.heard) == 1, READY_S)
            own = {**fields, "webhook": receiver.url}
            second = client.post("/v1/jobs", json=own).json()["id"]
            wait_until(lambda: len(receiver.heard) == 2, READY_S)
            runpod, event = (
                standardwebhooks.Webhook(secret).verify(content, headers)
                for headers, content in receiver.heard
            )
            assert (runpod["id"], runpod["status"]) == (first, "COMPLETED")
            assert frames_of(client.get(runpod["output"]["video_url"]).content) == 5
            assert (event["type"], event["data"]["id"]) == ("job.completed", second)

    def test_no_prompt_is_in_the_log(self, server: Process) -> None:
        with server.client() as client:
            job = client.post("/v1/jobs", json={"prompt": "a secret wish", **TINY}).json()["id"]
            client.post(f"/v1/jobs/{job}/cancel")
            client.post("/run", json={"input": {"prompt": "a secret wish", "frames": 6}})
        assert "secret wish" not in server.said()


class TestLife:
    def test_it_answers_before_the_gpu_process_is_there(self, tmp_path: Path) -> None:
        """Within how long: benchmarks/serve/speed.py, on a machine that is not busy."""
        with Process(tmp_path / "data") as process, process.client() as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").json() == {"ready": True, "state": "starting"}
            job = client.post("/v1/jobs", json={"prompt": "x", **TINY})
            assert job.status_code == 202, "what comes while it warms up is accepted"
            assert process.stop(signal.SIGHUP) == 0

    def test_at_sigterm_the_job_that_runs_ends_and_nothing_is_lost(self, tmp_path: Path) -> None:
        """It takes no more jobs, still tells of those it has, and ends with code 0; what had
        no time is made by the next server."""
        fields = {"prompt": "x", **TINY, "num_inference_steps": 40}
        first = Process(tmp_path / "data", WANFIT_GRACE_SECONDS="50")
        with first as process, process.client() as client:
            wait_until(lambda: client.get("/readyz").json()["state"] == "ready", READY_S)
            jobs = [client.post("/v1/jobs", json=fields).json()["id"] for _ in range(2)]
            wait_until(lambda: client.get(f"/v1/jobs/{jobs[0]}").json()["state"] != "queued")
            process.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.post("/v1/jobs", json=fields).status_code == 503)
            assert process.process.wait(60) == 0
        with Process(tmp_path / "data") as again, again.client() as client:
            states = [client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs]
            assert states[0] == "completed"
            assert states[1] in ("queued", "running")
            url = client.get(f"/v1/jobs/{jobs[0]}").json()["video"]["urls"]["video"]
            assert frames_of(client.get(url).content) == 5

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    def test_where_others_reach_it_it_insists_on_a_key(self, tmp_path: Path, host: str) -> None:
        environment = {**os.environ, "WANFIT_DATA": str(tmp_path)}
        result = subprocess.run(
            [*SERVE, "--host", host], env=environment, capture_output=True, text=True, timeout=30
        )
        assert result.returncode == 2
        assert "no API key" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_with_a_key_it_listens_there(self, tmp_path: Path) -> None:
        key = "wf_" + "k" * 40
        with Process(tmp_path / "data", "--host", "0.0.0.0", WANFIT_API_KEY=key) as process:
            port = process.url.rpartition(":")[2]
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
                assert client.get("/v1/jobs").status_code == 401
                headers = {"authorization": f"Bearer {key}"}
                assert client.get("/v1/jobs", headers=headers).status_code == 200
            assert process.stop(signal.SIGINT) == 0
        assert key not in (tmp_path / "data.log").read_text()

    def test_a_port_that_is_taken_is_said_in_one_line(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            environment = {**os.environ, "WANFIT_DATA": str(tmp_path)}
            result = subprocess.run(
                [*SERVE[:-1], port], env=environment, capture_output=True, text=True, timeout=30
            )
        assert result.returncode == 2
        assert "cannot be listened on" in result.stderr
        assert "Traceback" not in result.stderr
