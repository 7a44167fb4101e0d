"""Is anything lost, or does anybody wait, when S3 is away for a minute?

    python -m benchmarks.serve.s3_gone [--seconds 60] [--rate 1]

A real `wanfit serve` keeps clips in a bucket of rclone's S3 server on the loopback. Jobs are asked
for at a fixed rate. After some the S3 server is killed; in the middle of its absence the whole
`wanfit serve` is killed too, and started again without it. When S3 is back, every job has to be
completed, and its clip whole in the bucket. Ends with 1 when not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from benchmarks.serve.chaos import FIELDS, Server, frames_in
from tests.outputs.rclone import KEY, SECRET, Rclone, serving

PATIENCE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=1.0)
    asked = parser.parse_args()
    with serving() as s3, tempfile.TemporaryDirectory() as directory:
        (s3.root / "clips").mkdir()
        os.environ.update(
            AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, WANFIT_S3_ENDPOINT=s3.url,
            WANFIT_OUTPUTS="s3://clips/made",
        )  # fmt: skip
        server = Server(Path(directory) / "data")
        try:
            wrong = measure(server, s3, asked.seconds, asked.rate)
        finally:
            server.kill()
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(wrong))


def measure(server: Server, s3: Rclone, seconds: float, rate: float) -> list[str]:
    """What was wrong in the end."""
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        before = submit(client, seconds / 4, rate)
        s3.stop()
        gone_s = time.monotonic()
        print(f"S3 is away; {len(before)} jobs were accepted before")
        during = submit(client, seconds / 2, rate)
        ended = wait_for(client, during)
        urls = sum("127.0.0.1:" + str(s3.port) in link(client, job) for job in during)
        played = sum(frames_of(client, job) == FIELDS["num_frames"] for job in during)
        print(
            f"{len(during)} jobs accepted meanwhile: {ended} completed, {played} clips downloaded"
            f" and decoded without S3, {urls} of them by an address there"
        )
        server.kill()
        server.start()
        late = submit(client, seconds / 2, rate)
        print(f"server killed and started again without S3; {len(late)} jobs accepted since")
        wait_for(client, late)
        in_bucket = clips_in(s3)
        s3.start()
        back_s = time.monotonic()
        print(f"S3 is back, after {back_s - gone_s:.0f} s, with {in_bucket} clips")
        jobs = before + during + late
        completed = wait_for(client, jobs)
        while clips_in(s3) < len(jobs) and time.monotonic() - back_s < PATIENCE_S:
            time.sleep(0.2)
        print(
            f"{completed} of {len(jobs)} jobs completed, {clips_in(s3)} clips in the bucket"
            f" {time.monotonic() - back_s:.1f} s after S3 was back"
        )
        wrong = []
        if completed != len(jobs) or clips_in(s3) != len(jobs):
            wrong.append(f"{len(jobs)} jobs, {completed} completed, {clips_in(s3)} clips")
        bad = [job for job in jobs if frames_of(client, job) != FIELDS["num_frames"]]
        if bad or played != len(during):
            wrong.append(f"clips that do not play: {bad}, meanwhile {len(during) - played}")
        return wrong


def submit(client: httpx2.Client, seconds: float, rate: float) -> list[str]:
    """The jobs that were accepted within so many seconds."""
    jobs: list[str] = []
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        try:
            jobs.append(client.post("/v1/jobs", json={**FIELDS, "seed": len(jobs)}).json()["id"])
        except httpx2.TransportError:  # it is only starting
            time.sleep(0.1)
            continue
        time.sleep(1 / rate)
    return jobs


def wait_for(client: httpx2.Client, jobs: list[str]) -> int:
    """How many of them are completed, once all have ended or patience has."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            states = [client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs]
        except httpx2.TransportError:
            states = []
        if time.monotonic() > until_s or (
            states and not any(state in ("queued", "running") for state in states)
        ):
            return states.count("completed")
        time.sleep(0.3)


def link(client: httpx2.Client, job: str) -> str:
    """Everything that the server says of a job, addresses among it."""
    return client.get(f"/v1/jobs/{job}").text


def frames_of(client: httpx2.Client, job: str) -> int | None:
    reply = client.get(f"/v1/videos/{job}/content", follow_redirects=True)
    return frames_in(reply.content) if reply.status_code == 200 else None


def clips_in(s3: Rclone) -> int:
    return len(list((s3.root / "clips" / "made").glob("*/clip.mp4")))


if __name__ == "__main__":
    main()
