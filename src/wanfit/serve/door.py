"""The door: what was asked becomes an accepted job, or a refusal that says what would do.

    fields -> VideoRequest -> image -> ResolvedRequest -> limits of the key -> Plan -> job on disk

Everything that can be known is known before a job is accepted, so what waits in the queue can be
made here. The machine is read once, before the GPU process takes its memory: a plan is for the
budget of that process, not for what it leaves to others.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from wanfit.fetch import Guard, fetch_image
from wanfit.jobs.job import Job, NewJob, QueueLimit
from wanfit.media import read_upload
from wanfit.plan.machine import Machine, read_machine
from wanfit.plan.plan import Plan
from wanfit.plan.show import plan_json
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.serve.bodies import Picture
from wanfit.serve.desk import Desk
from wanfit.serve.gate import Caller, too_many
from wanfit.serve.limits import Buckets
from wanfit.serve.problems import Face, Problem
from wanfit.service import plan_request
from wanfit.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("wanfit.serve")

PNG_LEVEL = 1  # ours: an input is read once or twice; level 6 takes four times as long for 10 %
DOWNLOADS, PLANNERS = 16, 2  # ours: a download waits for a stranger, planning for a core
MAX_DEADLINE_S = 30 * 86_400.0  # ours: a job that waits for a month is forgotten


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a face has read it: names and values of nobody's checking yet."""

    face: Face
    fields: Mapping[str, Any]  # of VideoRequest, aliases too
    picture: Picture | None = None
    id: str | None = None
    priority: int = 0
    idempotency_key: str | None = None
    body_hash: str | None = None
    dedupe_s: float | None = None
    deadline_s: float | None = None
    timeout_s: float | None = None
    webhook: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quote:
    """A request that fits, and how it would run."""

    request: ResolvedRequest
    plan: Plan
    image: bytes | None  # PNG


class Door:
    """One per server. All that it does beside looking at fields is done in threads."""

    def __init__(self, settings: Settings, desk: Desk, guard: Guard) -> None:
        self._settings = settings
        self._desk = desk
        self._guard = guard
        self._jobs = Buckets()
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download")
        self._planners = ThreadPoolExecutor(PLANNERS, thread_name_prefix="plan")
        self.is_closed = False  # from the first signal on: the server drains
        self.machine: Machine = read_machine()

    def close(self) -> None:
        for pool in (self._downloads, self._planners):
            pool.shutdown(wait=False, cancel_futures=True)

    async def admit(self, asked: Asked, caller: Caller) -> tuple[Job, bool]:
        """The job that was accepted, and whether it is new. Raises Problem and WanfitError."""
        if self.is_closed:
            raise Problem(
                503, "draining", "This server is being stopped and takes no more jobs",
                headers={"retry-after": "30"},
            )  # fmt: skip
        wait_s = self._jobs.take(caller.id, caller.limits.jobs_per_minute / 60)
        if wait_s:
            raise too_many("jobs", wait_s)
        if asked.webhook is not None:
            await self._in(self._downloads, self._guard.check, asked.webhook)
        quote = await self.quote(asked.fields, asked.picture, caller)
        job, created = await self._desk.submit(
            self._new_job(asked, quote, caller), self._limit(caller)
        )
        if self._settings.log_prompts:
            log.info("job %s: %r", job.id, job.request.get("prompt"))
        return job, created

    async def quote(
        self, fields: Mapping[str, Any], picture: Picture | None, caller: Caller
    ) -> Quote:
        """What it would take to make this. Raises Problem and WanfitError.

        Cheap checks come first: a field that is wrong costs no download.
        """
        request = self.parse(fields)
        data = None if picture is None else picture.data
        if picture is not None and picture.url is not None:
            data = await self._in(self._downloads, fetch_image, picture.url, self._guard)
        return await self._in(self._planners, self._quote, request, data, caller)

    def parse(self, fields: Mapping[str, Any]) -> VideoRequest:
        """Raises BadOption."""
        return VideoRequest.parse({"model": self._settings.model, **fields})

    def _quote(self, request: VideoRequest, data: bytes | None, caller: Caller) -> Quote:
        image, size = (None, None) if data is None else _as_png(data)
        resolved = resolve(request, image_size=size)
        self._check_work(resolved, caller)
        planned = plan_request(
            resolved,
            self._machine,
            with_image=image is not None,
            device=self._settings.device,
            precision=self._settings.precision,
            vram=self._settings.vram_bytes,
            ram=self._settings.ram_bytes,
        )
        return Quote(resolved, planned.plan, image)

    def _machine(self, weights: Path) -> Machine:
        """This machine with the rates that are known by now, and the memory that was free before
        the GPU process took its part: that part is what a plan is for."""
        return replace(
            read_machine(weights=weights),
            vram_free_bytes=self.machine.vram_free_bytes,
            ram_available_bytes=self.machine.ram_available_bytes,
        )

    def _check_work(self, request: ResolvedRequest, caller: Caller) -> None:
        work = request.width * request.height * request.num_frames * request.num_inference_steps
        most = caller.limits.max_work
        if most is not None and work > most:
            raise Problem(
                403, "over_limit",
                f"{request.width}x{request.height} pixels x {request.num_frames} frames x"
                f" {request.num_inference_steps} steps are {work}, over the limit of {most} of"
                " this key",
                hint="Ask for fewer pixels, frames or steps",
            )  # fmt: skip

    @staticmethod
    async def _in(
        pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, partial(call, *args, **kwargs))

    def _limit(self, caller: Caller) -> QueueLimit:
        return QueueLimit(self._settings.max_queued, caller.limits.max_queued)

    def _new_job(self, asked: Asked, quote: Quote, caller: Caller) -> NewJob:
        request = fields_of(quote.request)
        plan = plan_json(quote.plan)
        del plan["settings"]  # they are the request
        now_s = time.time()
        deadline_s = asked.deadline_s
        return NewJob(
            face=asked.face,
            owner=caller.id,
            request=request,
            id=asked.id,
            image=quote.image,
            priority=asked.priority,
            idempotency_key=asked.idempotency_key,
            body_hash=asked.body_hash,
            dedupe_s=asked.dedupe_s,
            cache_key=_cache_key(request, quote.image) if self._settings.cache else None,
            deadline_s=None if deadline_s is None else min(deadline_s, now_s + MAX_DEADLINE_S),
            timeout_s=_least(asked.timeout_s, self._settings.job_s),
            webhook=asked.webhook,
            expected_s=quote.plan.seconds,
            plan=plan,
            extra=asked.extra,
        )


def _as_png(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """A picture as PNG with nothing else in it, and its (width, height). Raises BadImage."""
    image = read_upload(data)
    png = io.BytesIO()
    image.save(png, format="PNG", compress_level=PNG_LEVEL)
    return png.getvalue(), image.size


def fields_of(request: ResolvedRequest) -> dict[str, Any]:
    """The fields of a VideoRequest that resolves to this one on any day."""
    fields = {**request.describe(), **request.memory_flags.given()}
    del fields["fps"]  # the model's
    return fields


def _cache_key(request: Mapping[str, Any], image: bytes | None) -> str:
    said = json.dumps([request, None if image is None else hashlib.sha256(image).hexdigest()])
    return hashlib.sha256(said.encode()).hexdigest()


def _least(*seconds: float | None) -> float | None:
    return min((given_s for given_s in seconds if given_s is not None), default=None)
