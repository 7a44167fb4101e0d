"""A server on the loopback whose jobs are ended by hand.

Everything is real but the GPU process: uvicorn with our protocol, the gate, the faces, SQLite, and
clips in a directory. So hundreds of requests take seconds, and a job waits for as long as a test
wants. `test_serve_process` has the whole server as a process of its own.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import uvicorn

from wanfit.fetch import Guard, parse_allowed
from wanfit.jobs.job import Failure, Job, Progress
from wanfit.jobs.store import JobStore
from wanfit.jobs.telemetry import WorkerStatus
from wanfit.media import VideoWriter, check_output
from wanfit.outputs import LocalOutputs, Retention
from wanfit.serve.app import create_app
from wanfit.serve.desk import Desk
from wanfit.serve.door import Door
from wanfit.serve.hall import Hall
from wanfit.serve.keys import KeyFile, Keyring
from wanfit.serve.links import Links
from wanfit.serve.metrics import Metrics
from wanfit.serve.protocol import protocol_options
from wanfit.settings import Settings

TINY = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2}
START_S = 20.0
REPORT = {
    "output": "/secret/path/clip.mp4",
    "weights": "/secret/weights",
    "total_s": 1.5,
    "stages": [{"stage": "denoise", "elapsed_s": 0.5, "host_resident_bytes": 9}],
    "plan": {"stages": [{"stage": "denoise", "host_peak_bytes": 10, "device_peak_bytes": 0}]},
}


def write_clip(path: Path) -> None:
    """An mp4 of five frames that plays."""
    levels = np.linspace(0, 255, 5).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (5, 64, 64, 3))
    with VideoWriter(check_output(path), fps=16, metadata={"prompt": "x"}) as writer:
        writer.write(np.ascontiguousarray(frames))


class Running:
    """One server that answers, and what stands in for its GPU process."""

    def __init__(self, hall: Hall, keys: KeyFile, store: JobStore, url: str) -> None:
        self.hall, self.keys, self.store, self.url = hall, keys, store, url
        self.port = int(url.rpartition(":")[2])

    @contextmanager
    def client(self, key: str | None = None, **options: Any) -> Iterator[httpx2.Client]:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=self.url, headers=headers, timeout=30, **options) as client:
            yield client

    def begin(self, percent: float = 40.0) -> Any:
        """Claims the next job, and says that it is at a step."""
        claim = self.store.claim("test")
        assert claim is not None
        self.store.heartbeat(
            claim,
            Progress(percent, "denoise", 1, 2),
            [("stage", {"stage": "denoise", "steps": 2}),
             ("step", {"stage": "denoise", "step": 1, "steps": 2}),
             ("preview", {"content_type": "image/jpeg", "base64": "AAAA"})],
        )  # fmt: skip
        return claim

    def finish(self, claim: Any = None) -> Job:
        """Completes a claim, or the next job, with a clip."""
        claim = claim or self.begin()
        draft = self.hall.outputs.draft(claim.job.id, claim.lease)
        write_clip(draft)
        kept = self.hall.outputs.keep(
            draft, job_id=claim.job.id, attempt=claim.attempt, lease=claim.lease,
            metadata=claim.job.request,
        )  # fmt: skip
        return self.store.complete(claim, kept, REPORT)

    def fail(self, claim: Any = None, code: str = "worker_crashed") -> Job:
        return self.store.fail(claim or self.begin(), Failure(code, "It broke", "Try less"))


@contextmanager
def running(
    directory: Path, *, workers: tuple[WorkerStatus, ...] = (), **options: Any
) -> Iterator[Running]:
    """A server with these settings; with keys where `api_key` or the key file has one.

    workers: what is said of GPU processes, of which there are none.
    """
    settings = Settings(data=directory, port=0, **options)
    store = JobStore(settings.database_url)
    outputs = LocalOutputs(directory / "outputs", Retention(min_free_bytes=0, min_age_s=0))

    def delete(job_id: str, owner: str) -> Job:
        job = store.delete(job_id, owner)
        if job.result is not None:
            outputs.delete(job.result.key)
        return job

    metrics = Metrics()
    desk = Desk(store, delete, metrics.ended)
    keys = KeyFile(settings.keys_file)
    hall = Hall(
        settings=settings,
        desk=desk,
        door=Door(settings, desk, Guard(parse_allowed(",".join(settings.allowed_targets)))),
        outputs=outputs,
        links=Links(b"s" * 32, outputs, settings.url_s),
        metrics=metrics,
        workers=lambda: workers,
    )
    keyring = Keyring(keys, settings.api_key, settings.limits)
    listener = socket.create_server((settings.host, 0))
    config = uvicorn.Config(
        create_app(hall, keyring), log_config=None, access_log=False, lifespan="on",
        server_header=False, timeout_graceful_shutdown=1, **protocol_options(),
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Running(hall, keys, store, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        desk.end_waiting()
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive()
        store.close()


def wait_until(is_so: Callable[[], bool], wait_s: float = START_S) -> None:
    """Raises when it did not come true."""
    deadline_s = time.monotonic() + wait_s
    while not is_so():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def talk(port: int, data: bytes, wait_s: float = 10.0) -> bytes:
    """What a server answers to raw bytes, until it closes the connection or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        connection.sendall(data)
        answer = b""
        while True:
            try:
                piece = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return answer
            if not piece:
                return answer
            answer += piece
