"""`pull_model` in a process of its own, with the environment that a person would set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub_server import HubServer

# Small segments, so that tiny files take several; short waits. Arguments: JSON, see `start`.
_CHILD = """
import json, os, signal, sys
from pathlib import Path

from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V
from wanfit.errors import WanfitError
from wanfit.pull import model, pull_model, transfer

asked = json.loads(sys.argv[1])
transfer.SEGMENT_BYTES, transfer.FIRST_WAIT_S, transfer.PROGRESS_BYTES = 4096, 0.01, 1024
model.STEP_EVERY_S = 0
spec = {spec.name: spec for spec in (TINY_I2V, TINY_T2V, TINY_TI2V)}[asked.pop("spec")]
kill = asked.pop("kill")
count = 0

def on_step(step):
    global count
    if kill and step.phase == kill[0] and kill[1] in step.what:
        count += 1
        if count == kill[2]:
            os.kill(os.getpid(), signal.SIGKILL)

try:
    report = pull_model(spec, Path(asked.pop("target")), on_step=on_step, **asked)
except WanfitError as error:
    answer = {"error": error.code, "message": str(error)}
else:
    answer = report.to_json()
Path(sys.argv[2]).write_text(json.dumps(answer))
"""


class Child:
    """A pull in a process; `finish` gives its report, or {"error", "message"}."""

    def __init__(self, process: subprocess.Popen[str], answer: Path) -> None:
        self.process = process
        self._answer = answer

    def finish(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        assert (out, err) == ("", ""), "a pull prints nothing by itself"
        answer: dict[str, Any] = json.loads(self._answer.read_text())
        return answer

    def killed(self) -> None:
        """Waits for the end by a signal."""
        _, err = self.process.communicate(timeout=120)
        assert self.process.returncode < 0, err
        assert not self._answer.exists()


def start(
    hub: HubServer,
    target: Path,
    spec: str,
    *,
    kill: tuple[str, str, int] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Child:
    """Begins a pull of a tiny model; the hub's cache is hf/hub beside the target.

    kill: (phase, part of a name, count): SIGKILL at the count-th step like that.
    """
    answer = target.with_name("answer.json")
    answer.unlink(missing_ok=True)
    asked = {"spec": spec, "target": str(target), "kill": kill, **options}
    root = Path(__file__).parents[2]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _CHILD, json.dumps(asked), str(answer)],
        env=clean
        | {
            "PYTHONPATH": f"{root / 'src'}:{root}:{os.environ.get('PYTHONPATH', '')}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(target.with_name("hf")),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }
        | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Child(process, answer)
