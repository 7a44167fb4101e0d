"""One server from its settings to its end: opened, answering, draining, closed.

The socket answers before the GPU process is started, which takes seconds. At SIGTERM, Ctrl-C or
SIGHUP new jobs are refused, and status and clips are served until the jobs that run have finished
or gone back to the queue; a second signal ends it at once (and loses nothing: the lease tells).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from wanfit.errors import BadSetting
from wanfit.jobs.job import Notice
from wanfit.jobs.store import JobStore
from wanfit.jobs.supervisor import Supervisor
from wanfit.serve.app import create_app
from wanfit.serve.desk import Desk
from wanfit.serve.door import Door
from wanfit.serve.hall import Hall
from wanfit.serve.keys import KeyFile, Keyring
from wanfit.serve.links import Links, read_secret, webhook_secret
from wanfit.serve.metrics import Metrics
from wanfit.serve.notices import word_notice
from wanfit.serve.parts import engine_of, guard_of, make_private, open_outputs
from wanfit.serve.protocol import protocol_options
from wanfit.settings import Settings
from wanfit.webhooks import Sender

log = logging.getLogger("wanfit.serve")

CLOSE_S = 3  # ours: for answers that are on their way when everything else has ended
SWITCH_S = 0.0005  # ours: a thread may keep the interpreter for 5 ms else, and answers wait
KEEP_ALIVE_S = 75  # ours: longer than the 60 s of proxies, which else send into a closed connection


def serve(settings: Settings) -> None:
    """Runs until a signal. Raises BadSetting before anything is begun."""
    settings = replace(settings, data=settings.data.expanduser().absolute())
    keyring = Keyring(KeyFile(settings.keys_file), settings.api_key, settings.limits)
    if not settings.is_loopback and not keyring.asks:
        raise BadSetting(
            f"On {settings.host} anybody could use this server, and there is no API key",
            hint="wanfit keys add NAME makes one; or set WANFIT_API_KEY; or listen on 127.0.0.1",
        )
    make_private(settings.data)
    listener = _listen(settings)
    parts = _Parts(settings)
    config = uvicorn.Config(
        create_app(parts.hall, keyring),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
        **protocol_options(),
    )
    sys.setswitchinterval(SWITCH_S)
    try:
        _Server(config, parts).run(sockets=[listener])
    finally:
        parts.close()


class _Parts:
    """What a server is made of beside its HTTP."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = JobStore(settings.database_url)
        self.outputs = open_outputs(settings)
        self.metrics = Metrics()
        self.supervisor = Supervisor(
            self.store,
            self.outputs,
            [engine_of(settings)],
            log_dir=settings.data / "logs",
            observe=self.metrics.observe,
        )
        guard = guard_of(settings)
        desk = Desk(self.store, self.supervisor.delete, self.metrics.ended)
        links = Links(read_secret(settings.data / "link-secret"), self.outputs, settings.url_s)
        self.hall = Hall(
            settings=settings,
            desk=desk,
            door=Door(settings, desk, guard),
            outputs=self.outputs,
            links=links,
            metrics=self.metrics,
            workers=self.supervisor.status,
        )
        self._stopped = threading.Event()
        self._sender = Sender(self.store, guard, [webhook_secret(settings)], self._word)
        self._sending = threading.Thread(
            target=self._sender.run, args=(self._stopped,), daemon=True
        )
        self.address = ""

    def start(self, address: str) -> None:
        """Once the socket answers, at that address."""
        self.address = address
        self.supervisor.start()
        self._sending.start()

    def drain(self) -> None:
        """Returns when no job is being made any more."""
        self.hall.door.is_closed = True
        self.supervisor.stop(self.settings.grace_s)

    def close(self) -> None:
        self._stopped.set()
        if self._sending.is_alive():
            self._sending.join(CLOSE_S)
        self.store.close()

    def _word(self, notice: Notice) -> Mapping[str, Any]:
        job = self.store.get(notice.job_id)
        base_url = self.settings.public_url or self.address
        return word_notice(job, self.store.outlook(job), self.hall.links, base_url, notice)


class _Server(uvicorn.Server):
    """uvicorn's, with a drain between the first signal and the end."""

    def __init__(self, config: uvicorn.Config, parts: _Parts) -> None:
        super().__init__(config)
        self._parts = parts
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(signal.SIGHUP, self.handle_exit)
        assert sockets
        address = _address(sockets[0])
        print(f"wanfit serves at {address}", file=sys.stderr, flush=True)  # noqa: T201
        await asyncio.to_thread(self._parts.start, address)

    async def on_tick(self, counter: int) -> bool:
        if self._signals and self._draining is None:
            log.info("draining: jobs that run have %g s", self._parts.settings.grace_s)
            self._draining = asyncio.create_task(asyncio.to_thread(self._parts.drain))
        if self._draining is not None and self._draining.done():
            self._parts.hall.desk.end_waiting()
            return True
        return await super().on_tick(counter)


def _listen(settings: Settings) -> socket.socket:
    """A socket that is bound, so that a port in use is said in one line. Raises BadSetting."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise BadSetting(
            f"{settings.host} port {settings.port} cannot be listened on: {error.strerror}",
            hint="Another server may have it; --port names another one, 0 a free one",
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
