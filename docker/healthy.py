"""Whether the container does its work, for Docker's HEALTHCHECK: exit code 0 or 1 and a line.

`serve`: the server answers /livez. `runpod`: the worker's process is there, neither a zombie nor
stopped. No more can be seen from beside it: a worker has no port, and whether its queue hears from
it is the platform's to judge, by the SDK's pings. Needs nothing but the standard library.
"""

from __future__ import annotations

import itertools
import os
import sys
import urllib.request
from pathlib import Path


def serves() -> bool:
    """The server answers, on the port that the environment gives."""
    port = os.environ.get("WANFIT_PORT", "8000")
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # loopback, whatever proxy
    try:
        with direct.open(f"http://127.0.0.1:{port}/livez", timeout=4) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def works(proc: Path = Path("/proc")) -> bool:
    """A process `wanfit worker runpod` is there and can run."""
    for process in proc.glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it ended as we looked
        pairs = itertools.pairwise(words)
        if (b"worker", b"runpod") in pairs and state not in "ZTX":
            return True
    return False


def main(words: list[str]) -> int:
    """The exit code."""
    checks = {"serve": serves, "runpod": works}
    if len(words) != 1 or words[0] not in checks:
        sys.stderr.write("healthy.py: say serve or runpod\n")
        return 1
    healthy = checks[words[0]]()
    sys.stdout.write(f"{words[0]}: {'healthy' if healthy else 'does not answer'}\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
