"""Prometheus: what waits, what ran, how fast, and whether the plans were right.

Depths are asked of the store when they are scraped. What a job cost is counted once, when it ends;
the reports of all processes of this server pass through here, so nothing of the GPU process has to
be scraped. Left out: what happened before this server started, which the store has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from wanfit.jobs.job import Job, State
from wanfit.jobs.telemetry import AttemptEnded, Observation, ProcessEnded

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 3600)  # of a stage: demo to 14B
HTTP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100)
MAX_SEEN = 10_000  # ours: jobs of which it is known that they were counted


class Metrics:
    """One registry for one server; safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._jobs = Gauge("wanfit_jobs", "Jobs by state", ["state"], registry=registry)
        self._queue = Gauge("wanfit_queue_depth", "Jobs that wait", registry=registry)
        self._waiting_s = Gauge(
            "wanfit_queue_seconds", "Work that waits, by the plans", registry=registry
        )
        self._outcomes = Counter(
            "wanfit_job_outcomes", "Jobs that ended", ["outcome", "code"], registry=registry
        )
        self._retries = Counter(
            "wanfit_attempts_lost", "Attempts whose job is queued again", ["why"], registry=registry
        )
        self._processes = Counter(
            "wanfit_worker_deaths", "GPU processes that had to be replaced", ["code"],
            registry=registry,
        )  # fmt: skip
        self._job_s = Histogram(
            "wanfit_job_seconds", "From acceptance to the end", buckets=SECONDS, registry=registry
        )
        self._stage_s = Histogram(
            "wanfit_stage_seconds", "Of one stage", ["model", "stage"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._steps_per_s = Gauge(
            "wanfit_steps_per_second", "Denoising, in the newest job", ["model"], registry=registry
        )
        self._bytes = Gauge(
            "wanfit_stage_peak_bytes", "Of a stage of the newest job",
            ["model", "stage", "memory", "kind"], registry=registry,
        )  # fmt: skip
        self._worker_ready = Gauge(
            "wanfit_worker_ready", "1: the GPU process is", registry=registry
        )
        self._requests = Counter(
            "wanfit_http_requests", "Answers", ["method", "route", "status"], registry=registry
        )
        self._request_s = Histogram(
            "wanfit_http_seconds", "Of an answer", ["route"],
            buckets=HTTP_SECONDS, registry=registry,
        )  # fmt: skip

    def answered(self, method: str, route: str, status: int, elapsed_s: float) -> None:
        """One answer; `route` is a pattern, never a path, so that ids make no series."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_s.labels(route).observe(elapsed_s)

    def observe(self, observation: Observation) -> None:
        """What the supervisor tells."""
        match observation:
            case AttemptEnded(why=why):
                self._retries.labels(why).inc()
            case ProcessEnded(code=code):
                self._processes.labels(code).inc()

    def ended(self, job: Job) -> None:
        """A job that is over; told of one twice, it counts once."""
        if job.id in self._seen or not job.is_final:
            return
        self._seen[job.id] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        self._outcomes.labels(job.state, "" if job.error is None else job.error.code).inc()
        if job.ended_s is not None:
            self._job_s.observe(max(0.0, job.ended_s - job.created_s))
        if job.report is not None and not job.cached:
            self._cost(str(job.request.get("model")), job.request, job.report)

    def _cost(self, model: str, request: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        planned = {stage["stage"]: stage for stage in report.get("plan", {}).get("stages", ())}
        for stage in report.get("stages", ()):
            name, elapsed_s = stage["stage"], stage["elapsed_s"]
            self._stage_s.labels(model, name).observe(elapsed_s)
            if name == "denoise" and elapsed_s > 0:
                self._steps_per_s.labels(model).set(request["num_inference_steps"] / elapsed_s)
            expected = planned.get(name, {})
            for memory, measured, predicted in (
                ("gpu", stage.get("device_reserved_bytes"), expected.get("device_peak_bytes")),
                ("host", stage.get("host_resident_bytes"), expected.get("host_peak_bytes")),
            ):
                if measured is not None:
                    self._bytes.labels(model, name, memory, "measured").set(measured)
                if predicted is not None:
                    self._bytes.labels(model, name, memory, "predicted").set(predicted)

    def text(self, counts: Mapping[State, int], waiting_s: float, *, ready: bool) -> bytes:
        """What Prometheus reads."""
        for state, count in counts.items():
            self._jobs.labels(state).set(count)
        self._queue.set(counts["queued"])
        self._waiting_s.set(waiting_s)
        self._worker_ready.set(ready)
        return generate_latest(self.registry)


CONTENT_TYPE = CONTENT_TYPE_LATEST
