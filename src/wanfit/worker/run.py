"""RunPod's SDK, started with our handler, from the settings to the end.

Before the SDK begins, all is checked that can be: half a bucket, a bucket that takes nothing, a
database that cannot be there. Threads begin after it: the SDK forks a process for its pings.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from typing import Any

from wanfit.errors import BadSetting
from wanfit.serve.parts import make_private
from wanfit.worker.delivery import checked
from wanfit.worker.drain import Drain, Drained
from wanfit.worker.handler import Handler
from wanfit.worker.settings import WorkerSettings

log = logging.getLogger("wanfit.worker")
QUEUE_VARIABLE = "RUNPOD_WEBHOOK_GET_JOB"  # the SDK's: without it, it runs one job or a server
LOG_VARIABLES = ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL")  # the SDK's: DEBUG, when neither is set


def run(settings: WorkerSettings) -> None:
    """Works until a signal. Arguments of the SDK are read by it from the command line.

    Raises BadSetting, StoreFailed before anything is begun.
    """
    if settings.bucket is not None:
        checked(settings.bucket)
    make_private(settings.server.data)
    if not any(os.environ.get(name) for name in LOG_VARIABLES):
        os.environ[LOG_VARIABLES[0]] = "INFO"  # at DEBUG it logs prompts and whole clips
    start = _sdk_start()
    handler = Handler(settings, is_local=QUEUE_VARIABLE not in os.environ)
    drain = Drain(settings.concurrency, handler.open, lambda: handler.held)
    # The pings' process has this handler until the SDK sets its own here, and must end by it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()
    try:
        start({"handler": handler.handle, "concurrency_modifier": drain.modifier})
    except Drained:
        log.info("drained: nothing is left to do")
    finally:
        handler.close()


def _sdk_start() -> Any:  # the SDK has no types
    try:
        from runpod.serverless import start  # type: ignore[import-untyped]
    except ImportError as error:
        raise BadSetting(
            f"RunPod's SDK is not there: {error}", hint="pip install 'wanfit[runpod]'"
        ) from None
    return start
