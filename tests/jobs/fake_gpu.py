"""The real GPU process with another engine: what it does is in the prompt. Started by the tests.

The pipes, the cancelling, the last words and the ending are those of `wanfit.jobs.gpu`; only torch
and the model are left out, so that a process is there in half a second and dies as it is told.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from wanfit.errors import BadOutput, DoesNotFit
from wanfit.events import Event, Notice, StageBegan, StepDone
from wanfit.jobs import gpu
from wanfit.jobs.wire import Order
from wanfit.media import VideoWriter, check_output

MARKS = "WANFIT_TEST_MARKS"  # a directory in which "once" is remembered
FRAMES = np.zeros((5, 32, 32, 3), np.uint8)


def generate(order: Order, depot: object, hear: Callable[[Event], None]) -> dict[str, Any]:
    """A prompt is an action, and perhaps "once": the next attempts make the clip."""
    action, *rest = str(order.request["prompt"]).split()
    if rest == ["once"] and not _first_time(order):
        action = "make"
    hear(StageBegan("denoise", 4))
    hear(StepDone("denoise", 1, 4))
    _ACTIONS[action](order, hear)
    hear(StageBegan("decode", None))
    with VideoWriter(check_output(order.output), fps=16, metadata={}) as writer:
        writer.write(FRAMES)
    return {"output": order.output, "total_s": 0.1}


def _first_time(order: Order) -> bool:
    mark = Path(os.environ[MARKS]) / order.attempt_id.partition(".")[0]
    if mark.exists():
        return False
    mark.touch()
    return True


def _steps(hear: Callable[[Event], None], count: int) -> None:
    for step in range(1, count + 1):
        time.sleep(0.05)
        hear(StepDone("denoise", step, count))


def _refuse(order: Order, hear: object) -> None:
    raise DoesNotFit("It needs 9 and there are 8", hint="Ask for 8")


def _full(order: Order, hear: object) -> None:
    raise BadOutput("Cannot write") from OSError(errno.ENOSPC, "No space left on device")


def _break(order: Order, hear: object) -> None:
    raise ValueError("/secret/path")


def _image(order: Order, hear: Callable[[Event], None]) -> None:
    hear(Notice(f"the image is {order.image_base64}"))


_ACTIONS: dict[str, Callable[[Order, Any], object]] = {
    "make": lambda _order, _hear: None,
    "slow": lambda _order, hear: _steps(hear, 400),
    "steady": lambda _order, hear: _steps(hear, 20),
    "hang": lambda _order, _hear: time.sleep(1000),
    "segv": lambda _order, _hear: ctypes.string_at(0),
    "kill": lambda _order, _hear: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda _order, _hear: os._exit(3),
    "break": _break,
    "refuse": _refuse,
    "full": _full,
    "image": _image,
}


def main() -> None:
    gpu._warm_up = lambda device: SimpleNamespace(device="fake")  # type: ignore
    gpu._generate = generate
    gpu.main()


if __name__ == "__main__":
    main()
