"""RunPod's queue on the loopback, as the worker of its SDK sees it, with faults on demand.

    with RunpodQueue() as queue:
        worker = subprocess.Popen([...], env={**os.environ, **queue.environment()})
        job = queue.submit({"prompt": "a red ring"})
        assert queue.result(job)["output"]["status"] == "completed"

The calls are those that runpod 1.12 makes: job-take and job-take-batch (held open until there is a
job), job-stop, job-done (progress and result), job-stream, ping. `queue.faults` makes it behave as
queues do on bad days. Needs the standard library alone. Left out: the side of whoever sends jobs
(/run, /status), and scaling.
"""

from __future__ import annotations

import json
import re
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

KEY = "rpa_a_key_of_the_loopback"
MAX_BODY_BYTES = 20 << 20  # RunPod's, of a result that is waited for
HOLD_S = 1.0  # of a poll with nothing to tell; RunPod holds longer, which tests need not wait for
LOOK_S = 0.02

Kind = Literal["progress", "result", "stream"]
_PATH = re.compile(r"/v2/(?P<endpoint>[^/]+)/(?P<call>[a-z-]+)/(?P<worker>[^/]+)(/(?P<job>[^/]+))?")


@dataclass(frozen=True, slots=True)
class Post:
    """One body that a worker sent about a job."""

    job_id: str
    kind: Kind
    body: Any
    num_bytes: int
    status: int | None  # answered; None: the connection was cut instead
    at_s: float  # of time.monotonic()


@dataclass(slots=True)
class Faults:
    """What goes wrong; change it while the queue runs. Numbers count down."""

    takes: deque[int] = field(default_factory=deque)  # statuses for the next takes: 204, 400, 429
    raw_takes: deque[bytes] = field(default_factory=deque)  # bodies for the next takes, as JSON
    slow_take_s: float = 0.0  # before a job is handed over
    refused_results: int = 0  # so many are refused ...
    refused_status: int = 500  # ... with this
    lost_replies: int = 0  # so many results are accepted, and the connection is cut
    slow_progress_s: float = 0.0  # before progress is answered
    refuses_pings: bool = False
    max_body_bytes: int = MAX_BODY_BYTES
    too_large_status: int = 413  # or 400


class RunpodQueue:
    """hold_s: how long a poll is held. key: what the worker has to say in `Authorization`."""

    def __init__(self, *, hold_s: float = HOLD_S, key: str = KEY, endpoint: str = "ep") -> None:
        self.faults = Faults()
        self.hold_s = hold_s
        self.calls: list[str] = []  # "job-take", ..., in the order of their coming
        self.pings: list[dict[str, list[str]]] = []  # their queries
        self.posts: list[Post] = []
        self._key = key
        self._endpoint = endpoint
        self._jobs: dict[str, dict[str, Any]] = {}
        self._waiting: deque[dict[str, Any]] = deque()
        self._stops: deque[str] = deque()
        self._taken: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._port = 0
        self.come_back()

    def __enter__(self) -> RunpodQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v2/{self._endpoint}"

    def environment(self, worker: str = "worker-1", ping_ms: int = 1000) -> dict[str, str]:
        """Variables by which the SDK finds this queue and nothing else."""
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=LOOPBACK",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=LOOPBACK",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=LOOPBACK",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID?gpu=LOOPBACK",
            "RUNPOD_PING_INTERVAL": str(ping_ms),  # below 1000 the SDK makes 0 of it
            "RUNPOD_POD_ID": worker,
            "RUNPOD_AI_API_KEY": self._key,
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    # the side of the tests

    def submit(self, job_input: Any, *, job_id: str | None = None, **beside: Any) -> str:
        """Puts a job into the queue. beside: what stands beside `input` (policy, s3Config, ...)."""
        job = {"id": job_id or f"{uuid.uuid4()}-u1", "input": job_input, **beside}
        with self._changed:
            self._jobs[job["id"]] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return str(job["id"])

    def deliver_again(self, job_id: str) -> None:
        """The same job once more, as after pings that were missed."""
        with self._changed:
            self._waiting.append(self._jobs[job_id])
            self._changed.notify_all()

    def stop(self, job_id: str) -> None:
        """Tells the worker to stop a job, known or not."""
        with self._changed:
            self._stops.append(job_id)
            self._changed.notify_all()

    def vanish(self) -> None:
        """Connections are cut and refused until `come_back`."""
        with self._changed:
            server, self._server = self._server, None
            connections, self._connections = self._connections, set()
            self._changed.notify_all()
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in connections:
            _cut(connection)

    def come_back(self) -> None:
        """On the old port."""
        server = _Server(("127.0.0.1", self._port), self)
        self._port = server.server_address[1]
        with self._changed:
            self._server = server
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self.vanish()

    def posts_of(self, job_id: str, kind: Kind | None = None) -> list[Post]:
        """What was sent about a job, in order."""
        with self._changed:
            return [
                post for post in self.posts
                if post.job_id == job_id and kind in (None, post.kind)
            ]  # fmt: skip

    def result(self, job_id: str, wait_s: float = 60.0, *, nth: int = 1) -> Any:
        """The body of its nth result that was accepted. Raises TimeoutError."""

        def accepted() -> list[Post]:
            return [
                post for post in self.posts
                if post.job_id == job_id and post.kind == "result" and post.status in (200, None)
            ]  # fmt: skip

        self.wait(lambda: len(accepted()) >= nth, wait_s, f"result {nth} of {job_id}")
        return accepted()[nth - 1].body

    def wait_taken(self, job_id: str, wait_s: float = 60.0) -> None:
        """Until a worker has it. Raises TimeoutError."""
        self.wait(lambda: job_id in self._taken, wait_s, f"{job_id} taken")

    def wait_call(self, call: str, more_than: int = 0, wait_s: float = 60.0) -> None:
        """Until a call came so often. Raises TimeoutError."""
        self.wait(lambda: self.calls.count(call) > more_than, wait_s, call)

    def wait(self, is_so: Callable[[], bool], wait_s: float = 60.0, what: str = "it") -> None:
        """Until something is so that the queue knows of. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(is_so, wait_s):
                raise TimeoutError(f"{what} did not come in {wait_s:g} s")

    # the side of the worker; each in a thread of its own

    def _note(self, call: str) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def _take(self, most: int, is_there: Callable[[], bool]) -> list[dict[str, Any]]:
        """Jobs for a poll; none after `hold_s`, or when nobody listens any more."""
        until_s = time.monotonic() + self.hold_s
        with self._changed:
            while not self._ended and is_there():
                if self._waiting:
                    if self.faults.slow_take_s:
                        self._changed.wait_for(lambda: self._ended, self.faults.slow_take_s)
                        if not is_there() or not self._waiting:
                            continue
                    found = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
                    self._taken += [job["id"] for job in found]
                    self._changed.notify_all()
                    return found
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, LOOK_S))
        return []

    def _take_stops(self, is_there: Callable[[], bool]) -> list[str]:
        until_s = time.monotonic() + self.hold_s
        with self._changed:
            while not self._ended and is_there():
                if self._stops:
                    found = list(self._stops)
                    self._stops.clear()
                    return found
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, LOOK_S))
        return []

    def _posted(self, job_id: str, kind: Kind, body: bytes) -> int | None:
        """The status to answer with; None: the connection is to be cut."""
        faults = self.faults
        status: int | None = 200
        if kind == "progress" and faults.slow_progress_s:
            time.sleep(faults.slow_progress_s)
        if len(body) > faults.max_body_bytes:
            status = faults.too_large_status
        elif kind == "result" and faults.refused_results > 0:
            faults.refused_results -= 1
            status = faults.refused_status
        elif kind == "result" and faults.lost_replies > 0:
            faults.lost_replies -= 1
            status = None
        with self._changed:
            self.posts.append(
                Post(job_id, kind, json.loads(body), len(body), status, time.monotonic())
            )
            self._changed.notify_all()
        return status

    def _next_fault(self) -> int | bytes | None:
        with self._changed:
            if self.faults.takes:
                return self.faults.takes.popleft()
            return self.faults.raw_takes.popleft() if self.faults.raw_takes else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], queue: RunpodQueue) -> None:
        self.queue = queue
        super().__init__(address, _Call)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that was killed cuts its connections: no traceback for that."""


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.queue._connections.add(self.connection)

    def finish(self) -> None:
        self.server.queue._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the queue keeps `calls`."""

    def do_GET(self) -> None:
        call, worker, _, query = self._parsed()
        queue = self.server.queue
        if not self._is_let_in():
            return
        queue._note(call)
        match call:
            case "job-take" | "job-take-batch":
                self._give(call, int(query.get("batch_size", ["1"])[0]))
            case "job-stop":
                found = queue._take_stops(self._is_there)
                self._answer(200, {"jobsToStop": found}) if found else self._answer(204)
            case "ping":
                with queue._changed:
                    queue.pings.append({**query, "worker": [worker]})
                    queue._changed.notify_all()
                self._answer(500 if queue.faults.refuses_pings else 200, {})
            case _:
                self._answer(404, {"error": "no such call"})

    def do_POST(self) -> None:
        call, _, job_id, query = self._parsed()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_let_in():
            return
        queue = self.server.queue
        queue._note(call)
        if call not in ("job-done", "job-stream"):
            self._answer(404, {"error": "no such call"})
            return
        try:
            said = json.loads(body)
        except ValueError:
            self._answer(400, {"error": "the body is not JSON"})
            return
        kind: Kind = "stream" if call == "job-stream" else "result"
        if isinstance(said, dict) and said.get("status") == "IN_PROGRESS":
            kind = "progress"
        status = queue._posted(job_id, kind, body)
        if status is None:
            self.close_connection = True
            _cut(self.connection)
        else:
            self._answer(status, {"isStream": query.get("isStream", [""])[0]})

    def _give(self, call: str, most: int) -> None:
        queue = self.server.queue
        fault = queue._next_fault()
        if isinstance(fault, int):
            self._answer(fault, {} if fault >= 400 else None)
        elif isinstance(fault, bytes):
            self._write(200, fault)
        else:
            jobs = queue._take(most, self._is_there)
            if not jobs:
                self._answer(204)
            else:
                self._answer(200, jobs if call == "job-take-batch" else jobs[0])

    def _parsed(self) -> tuple[str, str, str, dict[str, list[str]]]:
        """(call, worker, job, query)."""
        parts = urlsplit(self.path)
        found = _PATH.fullmatch(parts.path)
        if found is None:
            return "", "", "", {}
        return found["call"], found["worker"], found["job"] or "", parse_qs(parts.query)

    def _is_let_in(self) -> bool:
        if str(self.headers.get("Authorization")) == self.server.queue._key:
            return True
        self._answer(401, {"error": "the key is another one"})
        return False

    def _is_there(self) -> bool:
        """Whether the worker still waits for the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return self.server.queue._server is self.server
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _answer(self, status: int, value: Mapping[str, Any] | list[Any] | None = None) -> None:
        self._write(status, b"" if value is None else json.dumps(value).encode())

    def _write(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed already
