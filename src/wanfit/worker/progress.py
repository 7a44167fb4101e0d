"""Progress of one job, sent to RunPod in order, at a pace, and never after the result.

The SDK's own `progress_update` starts a thread for each call, so updates overtake each other and
the result. Here one task sends them one after the other, the newest first to go, over the SDK's own
session and address. An update that cannot be sent is dropped: the next one says more.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

from wanfit.jobs.job import Job

log = logging.getLogger(__name__)
PACE_S = 1.0  # ours: who polls a status does not do it more often
POST_S = 5.0  # ours: the result waits for an update that is on its way, so long at most

NOT_SET = "JOB_DONE_URL"  # the SDK's word where it runs without a queue


class ProgressSender:
    """For one job, in one event loop: `tell` it, and `close` it before the result goes out."""

    def __init__(self, delivered_id: str, address: str, pace_s: float = PACE_S) -> None:
        """address: where the SDK sends results, `$ID` standing for the job."""
        self._url = address.replace("$ID", delivered_id) + "&isStream=false"
        self._pace_s = pace_s
        self._newest: dict[str, Any] | None = None
        self._told = asyncio.Event()
        self._closed = asyncio.Event()
        self._task = None if address == NOT_SET else asyncio.create_task(self._send())

    def tell(self, job: Job) -> None:
        """Where the job is now."""
        update = {
            "request_id": job.id, "status": job.state, "percent": round(job.percent, 2),
            "stage": job.stage, "step": job.step, "steps": job.steps,
        }  # fmt: skip
        if update != self._newest:
            self._newest = update
            self._told.set()

    async def close(self) -> None:
        """Nothing is sent after it returns."""
        self._closed.set()
        self._told.set()
        if self._task is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._task, POST_S + 1)

    async def _send(self) -> None:
        from runpod.http_client import AsyncClientSession  # type: ignore[import-untyped]

        try:
            async with AsyncClientSession() as session:
                while not self._closed.is_set():
                    await self._told.wait()
                    self._told.clear()
                    if not self._closed.is_set():
                        await self._post(session, self._newest)
                        with suppress(TimeoutError):
                            await asyncio.wait_for(self._closed.wait(), self._pace_s)
        except Exception:
            log.exception("progress is not sent any more")

    async def _post(self, session: Any, update: Any) -> None:
        from aiohttp import ClientError, ClientTimeout

        body = json.dumps({"status": "IN_PROGRESS", "output": update})
        try:
            async with session.post(self._url, data=body, timeout=ClientTimeout(POST_S)) as answer:
                await answer.read()
        except (ClientError, TimeoutError) as error:
            log.debug("an update was not sent: %s", type(error).__name__)
