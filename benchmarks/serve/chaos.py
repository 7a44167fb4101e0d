"""Does every accepted job end once, in a clip that plays, whatever dies meanwhile?

    python -m benchmarks.serve.chaos [--jobs 1000] [--clients 50] [--gpu-kills 20]
                                     [--server-kills 5] [--calm 300] [--seed 0]

A real `wanfit serve` makes the smallest clips that the demo can make, on the CPU with one thread.
Clients ask for one after the other over the loopback, each with an Idempotency-Key, and ask again
when a reply is lost. At random moments, spread over all jobs, the GPU process or the whole server
gets SIGKILL; a dead server is started again at once. Then `--calm` jobs without kills show whether
memory grows. At the end the database and the files are looked at: every key that was accepted is
one job, in state completed, with one final event, and a clip that was downloaded and decoded; no
file is there that no job has. Takes about ten minutes on two cores; ends with 1 when a claim fails.

`tests/serve/test_serve_chaos.py` is its short form.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx2
import uvloop

from wanfit.jobs.job import FINAL_STATES
from wanfit.jobs.store import JobStore
from wanfit.outputs import LocalOutputs, Retention

# The cheapest legal clip that moves.
FIELDS = {
    "prompt": "a blue star", "size": "32x32", "num_frames": 5, "num_inference_steps": 1,
    "guidance_scale": 1,
}  # fmt: skip
SERVE = [sys.executable, "-c", "from wanfit.cli import main; main()", "serve", "--port"]
POLL_S = (0.2, 0.6)  # between two looks of a client at its job
AGAIN_S = 0.1  # after a lost reply
AFTER_S = 0.5  # a kill comes up to so long after the job that calls for it
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run does."""

    jobs: int = 1000
    clients: int = 50
    gpu_kills: int = 20
    server_kills: int = 5
    calm: int = 300
    seed: int = 0


@dataclass(slots=True)
class Found:
    """What a run saw. `wrong` is empty when all claims hold."""

    wrong: list[str] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)  # key -> job
    clips: int = 0  # downloaded, all frames decoded
    lost_replies: int = 0
    gpu_kills: int = 0
    server_kills: int = 0
    attempts: Counter[int] = field(default_factory=Counter)  # jobs by attempts begun
    rss: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # (clips, bytes) of calm
    seconds: float = 0.0
    jobs_s: float = 0.0  # of the part with kills


class Server:
    """`wanfit serve` on one port, started again as often as it is killed."""

    def __init__(self, data: Path) -> None:
        self.data = data
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data.parent / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        environment = {
            **os.environ,
            "WANFIT_DATA": str(self.data),
            "WANFIT_DEVICE": "cpu",
            "WANFIT_JOBS_PER_MINUTE": "100000000",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*SERVE, str(self.port)], env=environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def gpu_pid(self) -> int | None:
        """Of its child that has the GPU."""
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"wanfit.jobs.gpu" in command:
                    return int(entry.name)
        return None


def run(wanted: Wanted, directory: Path, say: Callable[[str], None] = print) -> Found:
    """The whole story, in a directory that is empty."""
    server = Server(directory / "data")
    try:
        found = uvloop.run(_Run(wanted, server, say).all())
        code = server.stop()
        if code != 0:
            found.wrong.append(f"the server ended with {code} at SIGTERM")
    except BaseException:
        server.kill()
        raise
    _look_at_rows(server, found)
    return found


class _Run:
    """Clients, killers and the watch on memory, in one loop."""

    def __init__(self, wanted: Wanted, server: Server, say: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._server = server
        self._say = say
        self._random = random.Random(wanted.seed)
        self._found = Found()
        self._is_calm = False

    async def all(self) -> Found:
        began_s = time.monotonic()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        async with httpx2.AsyncClient(
            base_url=self._server.url, limits=limits, timeout=30
        ) as client:
            kills = asyncio.create_task(self._kill_all())
            await self._clients(client, range(self._wanted.jobs))
            await kills
            self._found.jobs_s = time.monotonic() - began_s
            self._is_calm = True
            watch = asyncio.create_task(self._watch())
            last = self._wanted.jobs + self._wanted.calm
            await self._clients(client, range(self._wanted.jobs, last))
            watch.cancel()
        self._found.seconds = time.monotonic() - began_s
        return self._found

    async def _clients(self, client: httpx2.AsyncClient, numbers: range) -> None:
        """Each takes the next number until there is none."""
        left = iter(numbers)

        async def work() -> None:
            for number in left:
                await self._job(client, number)

        await asyncio.gather(*(work() for _ in range(self._wanted.clients)))

    async def _job(self, client: httpx2.AsyncClient, number: int) -> None:
        key = f"key-{self._wanted.seed}-{number}"
        headers = {"Idempotency-Key": key}
        body = {**FIELDS, "seed": number}
        made = await self._persist(lambda: client.post("/v1/jobs", json=body, headers=headers))
        if made.status_code not in (200, 202):
            self._found.wrong.append(f"{key} was answered {made.status_code}: {made.text[:200]}")
            return
        job_id = made.json()["id"]
        self._found.accepted[key] = job_id
        while True:
            await asyncio.sleep(self._random.uniform(*POLL_S))
            seen = await self._persist(lambda: client.get(f"/v1/jobs/{job_id}"))
            if seen.status_code != 200:
                self._found.wrong.append(f"{job_id} vanished: {seen.status_code}")
                return
            state = seen.json()["state"]
            if state in FINAL_STATES:
                break
        if state != "completed":
            self._found.wrong.append(f"{job_id} ended as {state}: {seen.json()['error']}")
            return
        clip = await self._persist(lambda: client.get(f"/v1/videos/{job_id}/content"))
        frames = frames_in(clip.content) if clip.status_code == 200 else None
        if frames != FIELDS["num_frames"]:
            self._found.wrong.append(f"the clip of {job_id}: {clip.status_code}, {frames} frames")
            return
        self._found.clips += 1
        if self._found.clips % 100 == 0:
            self._say(f"{self._found.clips} clips")

    async def _persist(self, ask: Callable[[], Awaitable[httpx2.Response]]) -> httpx2.Response:
        """Asks until there is an answer, as a client does whose server was restarted."""
        while True:
            try:
                answer = await ask()
                if answer.status_code != 503:  # it is about to end
                    return answer
            except httpx2.TransportError:
                self._found.lost_replies += 1
            await asyncio.sleep(AGAIN_S)

    async def _kill_all(self) -> None:
        """At random counts of finished clips, and a random moment after each."""
        kills: list[Callable[[], Awaitable[None]]] = [
            *[self._kill_gpu] * self._wanted.gpu_kills,
            *[self._kill_server] * self._wanted.server_kills,
        ]
        self._random.shuffle(kills)
        # The last jobs are left out: what is killed after the last clip proves nothing.
        counts = sorted(self._random.randrange(self._wanted.jobs * 9 // 10) for _ in kills)
        for count, kill in zip(counts, kills, strict=True):
            while self._found.clips < count:
                await asyncio.sleep(0.02)
            await asyncio.sleep(self._random.uniform(0, AFTER_S))
            await kill()

    async def _kill_gpu(self) -> None:
        while (pid := self._server.gpu_pid()) is None:
            await asyncio.sleep(0.02)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._found.gpu_kills += 1

    async def _kill_server(self) -> None:
        self._server.kill()
        self._found.server_kills += 1
        self._server.start()

    async def _watch(self) -> None:
        """Resident bytes of both processes while nothing is killed."""
        while True:
            for name, pid in (("server", self._server.pid), ("gpu", self._server.gpu_pid())):
                with suppress(OSError):
                    if pid is not None:
                        samples = self._found.rss.setdefault(name, [])
                        samples.append((self._found.clips, _rss_bytes(pid)))
            await asyncio.sleep(SAMPLE_S)


def growth(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Median bytes of the second and of the last quarter of the clips: the first one warms up."""
    first, last = samples[0][0], samples[-1][0]
    quarter = (last - first) / 4
    early = [size for clips, size in samples if quarter <= clips - first < 2 * quarter]
    late = [size for clips, size in samples if clips - first >= 3 * quarter]
    return statistics.median(early), statistics.median(late)


def _look_at_rows(server: Server, found: Found) -> None:
    """What the database and the directory hold, once the server has ended."""
    store = JobStore(str(server.data / "jobs.sqlite3"))
    outputs = LocalOutputs(server.data / "outputs", Retention(min_free_bytes=0))
    try:
        counts = {state: count for state, count in store.counts().items() if count}
        if counts != {"completed": len(found.accepted)}:
            found.wrong.append(f"{len(found.accepted)} keys were accepted, the rows are {counts}")
        if len(set(found.accepted.values())) != len(found.accepted):
            found.wrong.append("two keys have one job")
        results = set()
        for job_id in found.accepted.values():
            job = store.get(job_id)
            found.attempts[job.attempts] += 1
            kinds = [event.kind for event in store.events(job_id)]
            if sum(kind in FINAL_STATES for kind in kinds) != 1:
                found.wrong.append(f"{job_id} has these events: {kinds}")
            if job.result is not None:
                results.add(job.result.key)
        kept = {stored.key for stored in outputs.keys()}  # noqa: SIM118  not a dict
        if kept != results:
            found.wrong.append(f"{len(kept - results)} orphans, {len(results - kept)} files gone")
        left = [str(path) for name in (".work", ".trash") for path in _in(server, name)]
        if left:
            found.wrong.append(f"left behind: {left[:5]}")
        if (log := server.log.read_text()).count("Traceback"):
            found.wrong.append(f"tracebacks in the log: {log[log.index('Traceback') :][:2000]}")
    finally:
        store.close()


def _in(server: Server, name: str) -> list[Path]:
    return list((server.data / "outputs" / name).iterdir())


def frames_in(data: bytes) -> int | None:
    """Frames of an mp4, all of them decoded; None: it does not play."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            return sum(1 for _ in container.decode(video=0))
    except av.FFmpegError:
        return None


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tell(wanted: Wanted, found: Found) -> list[str]:
    """The figures of a run."""
    retried = sum(count for attempts, count in found.attempts.items() if attempts > 1)
    by_attempts = ", ".join(f"{count} in {n}" for n, count in sorted(found.attempts.items()))
    lines = [
        f"{len(found.accepted)} jobs accepted from {wanted.clients} clients,"
        f" {found.clips} clips downloaded and decoded",
        f"{found.gpu_kills} kills of the GPU process, {found.server_kills} of the server,"
        f" {found.lost_replies} requests without a reply",
        f"attempts: {by_attempts}; {retried} jobs were run more than once",
        f"{found.jobs_s:.0f} s for {wanted.jobs} jobs with kills,"
        f" {found.seconds - found.jobs_s:.0f} s for {wanted.calm} without",
    ]
    for name, samples in found.rss.items():
        early, late = growth(samples)
        lines.append(
            f"resident, {name}: {early / 1e6:.1f} MB, later {late / 1e6:.1f} MB"
            f" ({100 * (late / early - 1):+.1f} %)"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in _defaults().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    wanted = Wanted(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as directory:
        found = run(wanted, Path(directory))
    print("\n".join(tell(wanted, found)))
    for samples in found.rss.values():
        early, late = growth(samples)
        if late > 1.05 * early:
            found.wrong.append(f"memory grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB")
    for line in found.wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(found.wrong))


def _defaults() -> dict[str, Any]:
    wanted = Wanted()
    return {name: getattr(wanted, name) for name in wanted.__slots__}


if __name__ == "__main__":
    main()
