"""Jobs as a face would hand them in, clocks that jump, and what an attempt keeps."""

from __future__ import annotations

from typing import Any

from wanfit.jobs.job import Claim, NewJob
from wanfit.jobs.store import JobStore
from wanfit.outputs import Kept, KeptFile, key_of

WORKER = "another-boot/1/1/1/0"
REPORT = {"total_s": 1.5}


def new_job(**options: Any) -> NewJob:
    """A small job of the owner "ann"."""
    request = {"prompt": "a small red circle", "model": "demo", "seed": 7}
    return NewJob(**{"face": "own", "owner": "ann", "request": request} | options)


def kept_by(claim: Claim) -> Kept:
    """What a store of outputs would say of this attempt's clip."""
    file = KeptFile(10, "0" * 64, "video/mp4")
    key = key_of(claim.job.id, claim.lease)
    return Kept(key, claim.job.id, claim.attempt, 1.0, 64, 64, 5, 16.0, {"video": file})


def claimed(store: JobStore, worker: str = WORKER) -> Claim:
    """The next claim, which has to be there."""
    claim = store.claim(worker)
    assert claim is not None
    return claim


class Clock:
    """Both clocks of a machine; the test lets time pass, and makes the wall clock jump."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.monotonic = 1000.0

    def wall_s(self) -> float:
        return self.wall

    def monotonic_s(self) -> float:
        return self.monotonic

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds
