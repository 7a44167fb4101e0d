"""One job of RunPod's queue, from its delivery to what is sent back: `Handler.handle`.

The job is kept under RunPod's own id before it is made, and its clip before it is answered. So a
job that is delivered again (since an answer was refused, or got lost) gets the clip that there is.
A job that failed is made once more when it comes again: that is what RunPod's /retry asks for.

An async function: the SDK stops a job by cancelling its task, and a synchronous handler would not
hear of it. The GPU process stops within a step, and only then is the next job asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from wanfit.errors import KeyReused, NoSuchJob, WanfitError
from wanfit.jobs.job import ID_PATTERN, Job, new_id
from wanfit.outputs import Bucket
from wanfit.serve.bodies import check_text, digest_of
from wanfit.serve.door import Asked
from wanfit.serve.gate import Caller
from wanfit.serve.problems import Problem, internal_problem, no_such_job, problem_of
from wanfit.serve.runpod_input import read_envelope, read_input
from wanfit.serve.runpod_view import output_json
from wanfit.serve.views import error_json
from wanfit.settings import Limits
from wanfit.worker.delivery import deliver, job_bucket
from wanfit.worker.health import health_json
from wanfit.worker.parts import Parts
from wanfit.worker.progress import NOT_SET, ProgressSender
from wanfit.worker.settings import WorkerSettings
from wanfit.worker.wording import error_output

log = logging.getLogger("wanfit.worker")
MAX_AGAIN = 20  # ours: attempts at one id of RunPod's, each delivered after the last had failed
# Ours: the GPU process failed to start so often in a row, with 6 s of waiting between the tries.
HOPELESS_STARTS = 3
STOPPED_S = 90.0  # ours: a step of the largest clip, and the killing of a process that is stuck
NOBODY = Caller("", Limits(requests_per_s=1e9, jobs_per_minute=1e9, max_queued=10**9))


class Handler:
    """What the SDK calls for each job. Everything else about it is begun by `open`."""

    def __init__(self, settings: WorkerSettings, *, is_local: bool) -> None:
        """is_local: jobs come from a command line or the SDK's own server, which reuses ids."""
        self._settings = settings
        self._is_local = is_local
        self._parts: Parts | None = None
        self._held: set[str] = set()

    @property
    def held(self) -> frozenset[str]:
        """Ids of the jobs that are here, as they were delivered."""
        return frozenset(self._held)

    def open(self) -> None:
        """In the SDK's event loop; the GPU process warms up from now on."""
        if self._parts is None:
            self._parts = Parts(self._settings)

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    async def handle(self, delivered: Mapping[str, Any]) -> dict[str, Any]:
        """The output, or `error`. Raises only when the job is stopped."""
        request_id = str(delivered.get("id"))[:200]
        self._held.add(request_id)
        try:
            self.open()
            return await self._answer(request_id, delivered)
        except _Hopeless as hopeless:
            log.error("job %s: the GPU process is beyond repair", request_id)
            return error_output(hopeless.problem, request_id, refresh=True)
        except Problem as problem:
            log.info("job %s: %s: %s", request_id, problem.code, problem)
            return error_output(problem, request_id)
        except WanfitError as error:
            log.info("job %s: %s: %s", request_id, error.code, error)
            return error_output(problem_of(error), request_id)
        except Exception:
            log.exception("job %s", request_id)
            return error_output(internal_problem(), request_id)
        finally:
            self._held.discard(request_id)

    async def _answer(self, request_id: str, delivered: Mapping[str, Any]) -> dict[str, Any]:
        parts, given = self._opened, delivered.get("input")
        check_text(given)
        if isinstance(given, dict) and given.get("action") == "health":
            return await asyncio.to_thread(health_json, self._settings, parts.supervisor.status())
        body = {"input": given, "policy": _policy(delivered)}
        order = read_input(body)
        if order.status_of is not None:
            return await self._status(order.status_of)
        asked = replace(
            read_envelope(body, order, self._own_id(request_id), takes_bucket=True),
            extra={"asked": digest_of(given)},
        )
        bucket = await asyncio.to_thread(job_bucket, delivered, parts.guard)
        job = await self._made(request_id, await self._accepted(asked))
        return await self._told(request_id, job, bucket)

    def _own_id(self, request_id: str) -> str:
        """Our id of a job of RunPod's: the same, where it is one that we keep."""
        if self._is_local:
            return new_id()
        if ID_PATTERN.fullmatch(request_id) and len(request_id) <= 70:
            return request_id
        return f"rp-{hashlib.sha256(request_id.encode()).hexdigest()[:48]}"

    async def _accepted(self, asked: Asked) -> Job:
        """The job of that id: as it is from an earlier delivery, or a new one."""
        parts = self._opened
        for again in range(MAX_AGAIN):
            job_id = f"{asked.id}-r{again}" if again else asked.id
            assert job_id is not None
            try:
                job = await parts.desk.get(job_id, NOBODY.id)
            except NoSuchJob:
                job, _ = await parts.door.admit(replace(asked, id=job_id), NOBODY)
                log.info("job %s: accepted, %.0f s by the plan", job.id, job.expected_s)
                return job
            if job.extra.get("asked") != asked.extra["asked"]:
                raise KeyReused(f"The id {asked.id!r} came before with another request")
            if not job.is_final or (job.state == "completed" and not job.output_gone):
                log.info("job %s: delivered again, and %s", job.id, job.state)
                return job
        raise Problem(
            400, "not_retriable", f"The job failed {MAX_AGAIN} times", hint="Send another"
        )

    async def _made(self, request_id: str, job: Job) -> Job:
        """The job once it is over; its progress is told meanwhile."""
        desk = self._opened.desk
        sender = ProgressSender(request_id, _progress_address())
        try:
            async with aclosing(desk.watch(job)) as changes:
                async for job in changes:
                    if job.is_final:
                        break
                    sender.tell(job)
                    self._check_hope(job)
            return job
        except asyncio.CancelledError:
            log.info("job %s: told to stop", job.id)
            await self._stop(job)
            raise
        except _Hopeless:
            await self._stop(job)
            raise
        finally:
            await sender.close()

    async def _stop(self, job: Job) -> None:
        """Returns when the GPU is free, so that the next job is not asked for before."""
        desk = self._opened.desk
        job = await desk.cancel(job.id, job.owner)
        job = await desk.wait_final(job, STOPPED_S)
        log.info("job %s: %s", job.id, job.state)

    def _check_hope(self, job: Job) -> None:
        """Raises _Hopeless for a job that waits for a GPU process that does not start."""
        workers = self._opened.supervisor.status()
        if job.state == "queued" and all(one.failed_starts >= HOPELESS_STARTS for one in workers):
            raise _Hopeless(
                Problem(
                    503, "gpu_error",
                    f"The GPU process did not start, {HOPELESS_STARTS} times in a row",
                    hint="The worker is replaced; send the job again. Its log has the reason",
                )
            )  # fmt: skip

    async def _told(self, request_id: str, job: Job, bucket: Bucket | None) -> dict[str, Any]:
        parts = self._opened
        error = error_json(job)
        if error is not None:
            problem = Problem(500, error["code"], error["message"], hint=error["hint"])
            if error["code"] == "gpu_error":  # in a fresh process each time, so it is the card
                raise _Hopeless(problem)
            raise problem
        url_s = self._settings.server.url_s
        video = await parts.desk.read_file(
            deliver, job, parts.outputs, url_s, bucket, has_bucket=parts.has_bucket
        )
        log.info("job %s: delivered as %s", job.id, next(iter(video)))
        return output_json(job, request_id, video)

    async def _status(self, asked_id: str) -> dict[str, Any]:
        """The older shape's question, about a job that this worker has made."""
        try:
            job = await self._opened.desk.get(asked_id, NOBODY.id)
        except NoSuchJob:
            raise no_such_job(asked_id) from None
        if job.state == "completed":
            return await self._told(asked_id, job, None)
        told = {"request_id": asked_id, "status": job.state, "percent": round(job.percent, 2)}
        error = error_json(job)
        return told if error is None else {**told, "failure": error}

    @property
    def _opened(self) -> Parts:
        assert self._parts is not None
        return self._parts


class _Hopeless(Exception):
    """No further job can be made by this worker."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _policy(delivered: Mapping[str, Any]) -> dict[str, Any]:
    """What is ours of a job's policy: how long it may run. Its waiting is RunPod's, and over."""
    policy = delivered.get("policy")
    timeout_ms = policy.get("executionTimeout") if isinstance(policy, dict) else None
    return {} if timeout_ms is None else {"executionTimeout": timeout_ms}


def _progress_address() -> str:
    from runpod.serverless.modules import rp_http  # type: ignore[import-untyped]

    address = getattr(rp_http, "JOB_DONE_URL", NOT_SET)
    return str(address)
