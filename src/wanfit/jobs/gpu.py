"""The GPU process: makes clips one after the other, and tells what happens.

    python -m wanfit.jobs.gpu ORDERS_FD NEWS_FD PARENT_PID DEVICE

It is started by the server (`process.py`) and holds everything that can die of a clip: torch, CUDA,
the weights. It knows no database and no queue. Between clips it keeps the weights of the last model
mapped and registered (`Depot`), and gives them back when another model comes. It ends with its
parent, whichever way that ends, and after an error that it does not know, since what CUDA holds
then is anybody's guess. Left out: SIGTERM, which the server handles for both.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import faulthandler
import io
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from wanfit.errors import WanfitError
from wanfit.events import Event, Notice, Preview, StageBegan, StepDone
from wanfit.jobs.wire import (
    EXIT_BROKEN,
    EXIT_ORPHAN,
    NewsKind,
    Order,
    as_line,
    read_lines,
    write_all,
)
from wanfit.request import VideoRequest
from wanfit.service import ALLOCATOR, ALLOCATOR_VARIABLE, generate

if TYPE_CHECKING:
    from wanfit.engine.weights.depot import Depot

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
PREVIEW_S = 1.0  # ours: at least so long between two; nobody looks at more


class Cancelled(Exception):
    """Raised between two events of an attempt that is to end."""


class Talk:
    """Both pipes: orders come in by a thread of their own, so that a cancel is heard at once."""

    def __init__(self, orders_fd: int, news_fd: int) -> None:
        self._orders = os.fdopen(orders_fd, "rb")
        self._news = os.fdopen(news_fd, "wb", buffering=0)
        self._waiting: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def next_order(self) -> Order:
        return self._waiting.get()

    def is_cancelled(self, attempt_id: str) -> bool:
        return attempt_id in self._cancelled

    def say(self, kind: NewsKind, attempt_id: str = "", **data: Any) -> None:
        try:
            with self._lock:
                line = as_line({"kind": kind, "attempt_id": attempt_id, "data": data})
                write_all(self._news, line)
        except OSError:
            os._exit(EXIT_ORPHAN)

    def _listen(self) -> None:
        for message in read_lines(self._orders):
            if "cancel" in message:
                self._cancelled.add(message["cancel"])
            else:
                self._waiting.put(Order.from_json(message))
        os._exit(EXIT_ORPHAN)


def main() -> None:
    orders_fd, news_fd, parent_pid = (int(word) for word in sys.argv[1:4])
    _end_with(parent_pid)
    faulthandler.enable()  # a segmentation fault leaves the Python stack on stderr
    os.dup2(2, 1)
    talk = Talk(orders_fd, news_fd)
    depot = _warm_up(sys.argv[4])
    talk.say("ready", device=str(depot.device), pid=os.getpid())
    while True:
        _attempt(talk, talk.next_order(), depot)


def _end_with(parent_pid: int) -> None:
    """The kernel kills this process when the thread that started it ends, so with the server."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it ended before the kernel was told
        os._exit(EXIT_ORPHAN)


def _warm_up(device: str) -> Depot:
    """Imports the engine and wakes the device, so that the first order waits for neither."""
    os.environ.setdefault(ALLOCATOR_VARIABLE, ALLOCATOR)
    import torch

    import wanfit.engine.pipeline  # noqa: F401  which imports the rest of the engine
    from wanfit.engine.device import sees_cuda, torch_device
    from wanfit.engine.weights.depot import Depot

    if device == "auto":
        device = "cuda" if sees_cuda() else "cpu"
    chosen = torch_device(device)
    torch.zeros(1, device=chosen)
    return Depot(chosen)


def _attempt(talk: Talk, order: Order, depot: Depot) -> None:
    told = order.attempt_id
    next_preview_s = 0.0

    def hear(event: Event) -> None:
        nonlocal next_preview_s
        if talk.is_cancelled(told):
            raise Cancelled
        match event:
            case Preview() if time.monotonic() >= next_preview_s:
                next_preview_s = time.monotonic() + PREVIEW_S
                talk.say("preview", told, content_type="image/jpeg", base64=_jpeg(event))
            case StageBegan(stage=stage, steps=steps):
                talk.say("stage", told, stage=stage, steps=steps)
            case StepDone(stage=stage, step=step, steps=steps):
                talk.say("step", told, stage=stage, step=step, steps=steps)
            case Notice(message=message):
                talk.say("notice", told, message=message)

    try:
        report = _generate(order, depot, hear)
    except Cancelled:
        talk.say("cancelled", told)
    except WanfitError as error:
        if _is_no_room(error):
            talk.say("no_room", told, message=str(error))
        else:
            talk.say("failed", told, code=error.code, message=error.message, hint=error.hint)
    except BaseException as error:  # noqa: BLE001  it is told, and this process ends
        traceback.print_exc()
        talk.say("broken", told, code=_code(error), message=_kind(error))
        os._exit(EXIT_BROKEN)
    else:
        talk.say("finished", told, report=report)


def _generate(order: Order, depot: Depot, hear: Any) -> dict[str, Any]:
    request = VideoRequest.parse(order.request)
    engine = order.engine
    image = None if order.image_base64 is None else base64.b64decode(order.image_base64)
    report = generate(
        request,
        output=order.output,
        image=image,
        weights=(engine.weights or {}).get(request.model),
        device=str(depot.device),
        precision=engine.precision,
        vram=engine.vram,
        ram=engine.ram,
        on_event=hear,
        depot=depot,
        previews=True,
    )
    return report.to_json()


def _jpeg(preview: Preview) -> str:
    """In base64; a few kB at most, since a preview has the latents' size."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(preview.frame).save(stream, format="JPEG", quality=85)
    return base64.b64encode(stream.getvalue()).decode()


def _is_no_room(error: BaseException | None) -> bool:
    """Whether the file system had no room, however deep in the chain of causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__
    return False


def _code(error: BaseException) -> str:
    return "gpu_error" if type(error).__name__ == "AcceleratorError" else "internal_error"


def _kind(error: BaseException) -> str:
    """For the job's owner: what kind of error, and none of what it may tell of this machine."""
    return f"The engine stopped with {type(error).__name__}"


if __name__ == "__main__":
    main()
