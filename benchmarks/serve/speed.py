"""How fast the server answers: from its start to /livez, and /status while a job runs.

    python -m benchmarks.serve.speed [--rate 500] [--seconds 20] [--connections 16] [--no-job]

A real `wanfit serve` with a real GPU process (demo on the CPU, one thread). /status is asked at a
fixed rate, whether or not earlier answers have come, so a stall counts for all that waited in it.
The asking shares the cores with the server. Targets of issue 6: /livez within 1 s of start; at
500/s a p99 under 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import uvloop

START = [sys.executable, "-c", "from wanfit.cli import main; main()", "serve", "--port"]
ASKED = {"prompt": "a blue star", "size": "128x128", "num_frames": 33, "num_inference_steps": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--no-job", action="store_true")
    asked = parser.parse_args()
    starts = [start_s() for _ in range(5)]
    print("start to /livez, s: " + ", ".join(f"{found:.2f}" for found in starts))
    with tempfile.TemporaryDirectory() as directory:
        process, port = start(Path(directory))
        try:
            job = submit(port, wait=not asked.no_job)
            before_s = cpu_s(process.pid)
            latencies = uvloop.run(
                ask(port, f"/status/{job}", asked.rate, asked.seconds, asked.connections)
            )
            used_s = cpu_s(process.pid) - before_s
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
                state = client.get(f"/status/{job}").json()["status"]
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    latencies.sort()
    cuts = statistics.quantiles(latencies, n=1000)
    print(
        f"/status, {len(latencies) / asked.seconds:.0f}/s, job {state}, ms:"
        f" p50 {1000 * cuts[499]:.2f}, p90 {1000 * cuts[899]:.2f}, p99 {1000 * cuts[989]:.2f},"
        f" p99.9 {1000 * cuts[998]:.2f}, most {1000 * latencies[-1]:.2f};"
        f" {1000 * used_s / len(latencies):.2f} ms of the server's CPU for each;"
        f" load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def cpu_s(pid: int) -> float:
    """What a process has used of the CPU; its children's own is not in it (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def start(directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    environment = {
        **os.environ, "WANFIT_DATA": str(directory), "WANFIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen([*START, str(port)], env=environment, stderr=log)
    while not answers(port):
        time.sleep(0.002)
    return process, port


def answers(port: int) -> bool:
    """Whether /livez is answered."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def start_s() -> float:
    with tempfile.TemporaryDirectory() as directory:
        began_s = time.perf_counter()
        process, _ = start(Path(directory))
        took_s = time.perf_counter() - began_s
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # the GPU process sees that its parent is gone
        return took_s


def submit(port: int, *, wait: bool) -> str:
    """A job that takes longer than the measurement; waits until it denoises."""
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        job = str(client.post("/run", json={"input": ASKED}).json()["id"])
        while wait:
            output = client.get(f"/status/{job}").json().get("output", {})
            if output.get("stage") == "denoise":
                break
            time.sleep(0.2)
    return job


async def ask(port: int, path: str, rate: float, seconds: float, connections: int) -> list[float]:
    """Seconds of every answer, counted from the moment at which it was to be asked for."""
    count = round(rate * seconds)
    began_s = time.perf_counter() + 0.1
    due: asyncio.Queue[float | None] = asyncio.Queue()
    latencies: list[float] = []
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (due_s := await due.get()) is not None:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            json.loads(await reader.readexactly(length))
            latencies.append(time.perf_counter() - due_s)
        writer.close()

    asking = [asyncio.create_task(one()) for _ in range(connections)]
    for index in range(count):
        due_s = began_s + index / rate
        if (left_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(left_s)
        due.put_nowait(due_s)
    for _ in asking:
        due.put_nowait(None)
    await asyncio.gather(*asking)
    return latencies


if __name__ == "__main__":
    main()
