"""One attempt at a job: ordered from the GPU process, followed, and stopped when it must be.

It keeps the lease by heartbeats that carry the progress, and hears by them that the job is to be
cancelled. What stops it: a cancel, a lease that is lost, its time, the server's end; and a process
that says nothing for too long is a hang. It is asked to stop first, so that it stays warm, and is
killed when it does not. Left out: what becomes of the job (`worker.py`).
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfit.errors import DatabaseBusy, DiskFull, StaleLease
from wanfit.jobs.endings import Ending, ending_of, oom_kills
from wanfit.jobs.job import Claim, EventKind, Failure
from wanfit.jobs.process import GpuProcess
from wanfit.jobs.progress import Track
from wanfit.jobs.store import JobStore
from wanfit.jobs.telemetry import Observe, StageEnded
from wanfit.jobs.wire import News, Order

log = logging.getLogger(__name__)
POLL_S = 0.1  # ours: how late a stop or an end may be noticed

StopReason = Literal["cancelled", "stale", "timed_out", "drained"]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an attempt may take for what. All of it ours."""

    hang_s: float = 300.0  # without news; longer where the plan expects longer steps
    cancel_s: float = 60.0  # from asking it to stop to killing it
    beat_s: float = 1.0  # between heartbeats; a cancel from another process waits for one
    news_s: float = 0.25  # between progress that is written down
    ready_s: float = 600.0  # to import torch and wake the device, from a cold disk too
    keep_s: float = 3600.0  # with a finished clip and no place that takes it


@dataclass(frozen=True, slots=True)
class Made:
    """The clip is where the order said."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """The request or the machine does not allow it, and another attempt would find the same."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The disk is full, which is not the job's fault."""

    message: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """It was told to, and did, or was killed."""

    reason: StopReason


@dataclass(frozen=True, slots=True)
class Died:
    """The process ended under it."""

    ending: Ending


Outcome = Made | Refused | NoRoom | Stopped | Died


class Attempt:
    """One attempt, driven by `run`. `must_drain`: whether the server's grace is over."""

    def __init__(
        self,
        claim: Claim,
        store: JobStore,
        patience: Patience,
        observe: Observe,
        must_drain: Callable[[], bool],
    ) -> None:
        self.claim = claim
        self.track = Track(claim.job.plan)
        self._store = store
        self._patience = patience
        self._observe = observe
        self._must_drain = must_drain
        self._began_s = self._heard_s = time.monotonic()
        self._beat_s = -1e9  # when the last heartbeat was
        self._look = threading.Event()  # somebody else changed the job: beat, and see
        self._thread = threading.get_ident()
        self._news: list[tuple[EventKind, Mapping[str, Any]]] = []
        self._stop: StopReason | None = None
        self._stop_s = 0.0  # when that was
        self._asked = False  # the process, to stop
        self._stage: tuple[str, int | None, float] | None = None  # name, steps, when it began
        self._last_words: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.claim.job.id}.{self.claim.lease}"

    def run(self, process: GpuProcess, output: Path) -> Outcome:
        """Until it has an outcome. The process may be over then."""
        kills = oom_kills()
        forget = self._store.listen(self._changed)
        try:
            process.send(self._order(process, output))
            while True:
                news = process.next_news(POLL_S)
                if news is None and process.is_over:
                    outcome: Outcome | None = self._ended(process, kills)
                else:
                    outcome = self._hear(news) or self._judge(process)
                if outcome is not None:
                    self._end_stage()
                    self._look.set()  # what came last is written before the job is settled
                    self.beat()
                    return outcome
                self.beat()
        finally:
            forget()

    def beat(self) -> None:
        """A heartbeat, where one is due."""
        wait_s = self._patience.news_s if self._news else self._patience.beat_s
        now_s = time.monotonic()
        if now_s - self._beat_s < wait_s and not self._look.is_set():
            return
        self._look.clear()
        self._beat_s = now_s
        try:
            if self._store.heartbeat(self.claim, self.track.now, self._news):
                self._stop_for("cancelled")
            self._news.clear()
        except StaleLease:
            log.warning("job %s: attempt %d lost its lease", self.claim.job.id, self.claim.attempt)
            self._stop_for("stale")
        except (DatabaseBusy, DiskFull) as error:
            log.warning("job %s: no heartbeat: %s", self.claim.job.id, error)

    @property
    def stop(self) -> StopReason | None:
        """Why it is to stop; None: it is not."""
        return self._stop

    def note(self, kind: EventKind, **data: Any) -> None:
        """An event for the next heartbeat."""
        if kind == "step" and self._news and self._news[-1][0] == "step":
            self._news.pop()  # several steps between two heartbeats: the last one tells enough
        self._news.append((kind, data))

    def _order(self, process: GpuProcess, output: Path) -> Order:
        job = self.claim.job
        image = self._store.image(job.id) if job.has_image else None
        return Order(
            attempt_id=self.id,
            request=job.request,
            image_base64=None if image is None else base64.b64encode(image).decode(),
            output=str(output),
            engine=process.engine,
        )

    def _hear(self, news: News | None) -> Outcome | None:
        if news is None or news.attempt_id != self.id:
            return None
        self._heard_s = time.monotonic()
        data = news.data
        match news.kind:
            case "stage":
                self._end_stage()
                self._stage = (data["stage"], data["steps"], time.monotonic())
                self.track.begin(data["stage"], data["steps"])
                self.note("stage", **data)
            case "step":
                self.track.step(data["stage"], data["step"], data["steps"])
                self.note("step", **data)
            case "notice":
                self.note("notice", **data)
            case "preview":
                self.note("preview", **data)
            case "finished":
                return self._given_up() or Made(dict(data["report"]))
            case "failed":
                return Refused(Failure(data["code"], data["message"], data["hint"]))
            case "no_room":
                return NoRoom(data["message"])
            case "cancelled":
                return Stopped(self._stop or "cancelled")
            case "broken":
                self._last_words = data  # its end, which follows, makes the outcome
        return None

    def _ended(self, process: GpuProcess, kills: int | None) -> Outcome:
        ending = ending_of(process.wait(), self._last_words, (kills, oom_kills()))
        return self._given_up() or Died(ending)

    def _given_up(self) -> Stopped | None:
        """However it ended, nobody wants it any more."""
        return Stopped(self._stop) if self._stop in ("cancelled", "stale") else None

    def _judge(self, process: GpuProcess) -> Outcome | None:
        """Whether it is time to stop it, or to kill it."""
        now_s = time.monotonic()
        timeout_s = self.claim.job.timeout_s
        if timeout_s is not None and now_s - self._began_s > timeout_s:
            self._stop_for("timed_out")
        if self._must_drain():
            process.kill()
            return Stopped("drained")
        if self._stop is not None:
            if not self._asked:
                process.cancel(self.id)
                self._asked = True
            if now_s - self._stop_s > self._patience.cancel_s:
                process.kill()
                return Stopped(self._stop)
        silent_s = now_s - self._heard_s
        if silent_s > self.track.patience_s(self._patience.hang_s):
            process.kill()
            stage = self.track.now.stage or "start"
            text = f"The GPU process did nothing for {silent_s:.0f} s in the stage {stage!r}"
            return Died(Ending(Failure("worker_hung", text), blame=True))
        return None

    def _stop_for(self, reason: StopReason) -> None:
        if self._stop is None:
            self._stop, self._stop_s = reason, time.monotonic()

    def _end_stage(self) -> None:
        if self._stage is not None:
            stage, steps, began_s = self._stage
            model = str(self.claim.job.request.get("model", ""))
            self._observe(StageEnded(model, stage, time.monotonic() - began_s, steps))
            self._stage = None

    def _changed(self, job_id: str) -> None:
        if job_id == self.claim.job.id and threading.get_ident() != self._thread:
            self._look.set()
