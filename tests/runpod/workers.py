"""`wanfit worker runpod` as a process, with the SDK as it is published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from wanfit.testing.runpod_queue import RunpodQueue

TINY = {"prompt": "a red ring", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
LONG = {**TINY, "num_inference_steps": 1000}  # half a minute, in steps of milliseconds
WAIT_S = 90.0  # for anything, on a busy machine
COMMAND = [sys.executable, "-c", "from wanfit.cli import main; main()", "worker", "runpod"]


def variables(data: Path, **more: str) -> dict[str, str]:
    """An environment without anything of RunPod's or of a bucket's, for a small CPU."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("RUNPOD_", "BUCKET_", "WANFIT_"))
    }  # fmt: skip
    return {
        **kept, "WANFIT_DATA": str(data), "WANFIT_DEVICE": "cpu", "WANFIT_MIN_FREE": "1MB",
        "OMP_NUM_THREADS": "1", "HOME": str(data.parent), **more,
    }  # fmt: skip


class WorkerProcess:
    """A worker of a queue, with its log."""

    def __init__(self, queue: RunpodQueue, data: Path, **more: str) -> None:
        self.queue, self.data = queue, data
        data.parent.mkdir(parents=True, exist_ok=True)
        self._log = (data.parent / f"{data.name}-{time.monotonic_ns()}.log").open("w+b")
        self.process = subprocess.Popen(
            COMMAND, env=variables(data, **queue.environment(), **more), stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=self._log, start_new_session=True, cwd=data.parent,
        )  # fmt: skip

    def said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def make(self, job_input: Any, **beside: Any) -> Any:
        """Submits a job and gives what the worker answers."""
        return self.queue.result(self.queue.submit(job_input, **beside), WAIT_S)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, wait_s: float = WAIT_S) -> int:
        return self.process.wait(wait_s)

    def kill(self) -> None:
        """With its pings, which are a process of their own; the GPU process ends by itself."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT_S)
        self._log.close()


def error_of(body: Any) -> dict[str, Any]:
    """The error of a result, whose form is what clients rely on."""
    assert "output" not in body, body
    assert isinstance(body["error"], str)
    error: dict[str, Any] = json.loads(body["error"])
    assert set(error) == {"code", "message", "hint", "request_id"}
    assert "Traceback" not in body["error"]
    assert "/work" not in body["error"]
    return error
