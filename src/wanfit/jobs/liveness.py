"""Whether a worker still lives, where this machine can tell.

A worker is named by where it runs: boot of the machine, namespace of process numbers, number and
start of the process, and its place in it. Only what is certain counts as dead: with a database that
other machines share, a worker of another boot may live on one of them.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def worker_name(slot: int = 0) -> str:
    """The name of a worker in this process: boot/namespace/pid/start/slot."""
    pid = os.getpid()
    return "/".join((_boot(), _namespace(), str(pid), str(_started(pid)), str(slot)))


def is_dead(worker: str, *, same_host: bool) -> bool:
    """Whether the process of that name is certainly gone.

    same_host: every worker runs on this machine, so one of another boot is gone.
    """
    boot, _, rest = worker.partition("/")
    if boot != _boot():
        return same_host
    namespace, _, rest = rest.partition("/")
    if namespace != _namespace():
        return False  # another container of this machine: its numbers mean nothing here
    pid, started, _ = rest.split("/")
    return _started(int(pid)) != int(started)


def _boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink(PROC / "self/ns/pid").removeprefix("pid:[").removesuffix("]")


def _started(pid: int) -> int | None:
    """When the process began, in ticks since boot; None: there is none, or only a zombie."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])  # proc(5): state is 3, starttime is 22
