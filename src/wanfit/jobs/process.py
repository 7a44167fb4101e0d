"""The server's hold of one GPU process: started, told, heard, ended. Imports no torch.

The process gets pipes for orders and news; what it prints goes into a log file, whose end is shown
when it dies. It has a session of its own, so that Ctrl-C in a terminal reaches the server alone,
which then decides.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from wanfit.jobs.wire import Engine, News, Order, as_line, read_lines, write_all

CLOSE_S = 5.0  # ours: between two clips it ends at once; in one, it is not asked for long
LOG_LINES = 15  # ours: the end of a traceback
MODULE = "wanfit.jobs.gpu"


class GpuProcess:
    """One GPU process. Use it from the thread that made it, which has to outlive it: the kernel
    ends the process with that thread (PR_SET_PDEATHSIG)."""

    def __init__(self, engine: Engine, log: Path, module: str = MODULE) -> None:
        self.engine = engine
        self.log = log
        self.device: str | None = None  # once it is ready
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        orders_out, orders_fd = os.pipe()
        news_fd, news_in = os.pipe()
        command = [sys.executable, "-m", module, str(orders_out), str(news_in)]
        try:
            with log.open("wb") as stream:
                self._process = subprocess.Popen(
                    [*command, str(os.getpid()), engine.device],
                    pass_fds=(orders_out, news_in),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
        except BaseException:
            os.close(orders_fd)
            os.close(news_fd)
            raise
        finally:
            os.close(orders_out)
            os.close(news_in)
        self._reader = threading.Thread(target=self._listen, args=(news_fd,), daemon=True)
        self._writer = threading.Thread(target=self._talk, args=(orders_fd,), daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def send(self, order: Order) -> None:
        self._orders.put(as_line(order.to_json()))

    def cancel(self, attempt_id: str) -> None:
        """Asks it to stop that attempt at its next event."""
        self._orders.put(as_line({"cancel": attempt_id}))

    def next_news(self, timeout_s: float) -> News | None:
        """The next piece of news; None when none came, or when all has come and `is_over`."""
        try:
            news = self._news.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if news is None:
            self._news.put(None)  # the end stays the end
            self.wait()
        elif news.kind == "ready":
            self.device = str(news.data["device"])
        return news

    @property
    def is_over(self) -> bool:
        """Whether it has ended. Its last words may still wait in `next_news`."""
        return self.returncode is not None

    def kill(self) -> int:
        """Ends it now; everything that it held, on the GPU too, is free afterwards."""
        if self.returncode is None:
            self._process.kill()
        return self.wait()

    def wait(self) -> int:
        """Its return code, once it is over; all of its news has come by then."""
        returncode = self._process.wait()
        self._orders.put(None)
        self._reader.join()
        self._writer.join()
        return returncode

    def close(self) -> int:
        """Lets it end by itself, or ends it."""
        self._orders.put(None)
        try:
            self._process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            return self.kill()
        return self.wait()

    def last_lines(self) -> str:
        """The end of what it printed."""
        try:
            text = self.log.read_bytes()[-64_000:].decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-LOG_LINES:])

    def _talk(self, orders_fd: int) -> None:
        """Writes orders from a thread of its own: an image is longer than a pipe, and a process
        that stands still reads none of it."""
        with suppress(OSError), os.fdopen(orders_fd, "wb", buffering=0) as stream:
            while (line := self._orders.get()) is not None:
                write_all(stream, line)

    def _listen(self, news_fd: int) -> None:
        with os.fdopen(news_fd, "rb") as stream:
            for message in read_lines(stream):
                self._news.put(News(**message))
        self._news.put(None)
