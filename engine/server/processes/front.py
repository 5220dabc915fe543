"""A front process: HTTP in, the engine's tokens out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from kvarena.engine.errors import KvarenaError, ModelError
from kvarena.engine.routing import Router
from kvarena.engine.server.admin.routes import add_admin_routes
from kvarena.engine.server.api.app import create_app
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.api.tracing import Tracer
from kvarena.engine.server.front.connection import BoundedConnection
from kvarena.engine.server.front.dashboard import PoolFeed
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import EngineGone
from kvarena.engine.server.media.parts import policy_of
from kvarena.engine.server.media.reader import ImageReader, image_inputs
from kvarena.engine.server.messages.routes import add_message_routes
from kvarena.engine.server.processes.listeners import BACKLOG
from kvarena.engine.server.processes.process import (
    DRAIN,
    ENGINE,
    EXIT,
    READY,
    ModelFiles,
    end_process,
    freeze_heap,
    start_log,
)
from kvarena.engine.server.processes.suspicion import Suspicion
from kvarena.engine.server.responses.routes import add_response_routes
from kvarena.engine.server.responses.store import ResponseStore
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.page import Page
from kvarena.engine.server.text.tokenization import TokenizerService, generation_defaults

logger = logging.getLogger("kvarena.front")

_WATCH_SECONDS = 0.25


class _Server(uvicorn.Server):
    """Leaves signals to the supervisor."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class Front:
    """Owns one front's sockets and tasks.

    Args:
        index: among the fronts.
        config: the server's settings.
        model: where the tokenizer is.
        listener: takes connections.
        engines: to the engines' processes.
        control: to the supervisor.
        page: the shared metrics.
        router: picks an engine for each prompt; None: there is one.
        responses: the file in which all fronts keep responses; None: none is kept.
    """

    def __init__(
        self,
        index: int,
        config: ServerConfig,
        model: ModelFiles,
        listener: socket.socket,
        engines: list[socket.socket],
        control: socket.socket,
        page: Page,
        router: Router | None,
        responses: Path | None,
    ) -> None:
        self._index, self._config, self._model = index, config, model
        self._listener, self._engines, self._control = listener, engines, control
        self._router, self._responses = router, responses
        self._rows = metrics.Rows(page, config.num_fronts, len(engines))
        self._row = self._rows.fronts[index][0]

    def main(self) -> None:
        """The process's main function; does not return."""
        start_log()
        # The supervisor decides when to stop; a Ctrl-C reaches the whole process group.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            with contextlib.suppress(ImportError):
                import uvloop

                asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
            asyncio.run(self._serve())
        except KvarenaError as error:
            print(f"error: {self._model.words(str(error))}", file=sys.stderr, flush=True)
            sys.exit(2)
        except EngineGone:
            sys.exit(1)  # the engine has said why
        end_process()

    async def _serve(self) -> None:
        """Serve until the supervisor says otherwise."""
        config = self._config
        feed = PoolFeed()
        client = Engines(config, self._index, self._rows, self._router, feed.publish)
        for number, sock in enumerate(self._engines):
            await client.connect(number, sock)
        tracer = Tracer.to_collector(config.otlp_endpoint) if config.otlp_endpoint else None
        service = await make_service(config, self._model, client, self._row, feed, tracer)
        feed.attach(client, self._rows, service.model_names[0])
        server = _Server(self._uvicorn_config(make_app(service, self._rows, self._responses)))
        freeze_heap()
        control = asyncio.create_task(self._obey(service, server))
        watch = asyncio.create_task(self._watch(service))
        try:
            await server.serve(sockets=[self._listener])
        finally:
            control.cancel()
            watch.cancel()
            service.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    def _uvicorn_config(self, app: object) -> uvicorn.Config:
        config = self._config
        return uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=functools.partial(BoundedConnection, timeout=config.body_timeout),  # type: ignore[arg-type]
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            # The log names who connected: X-Forwarded-For is whatever a client writes.
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=3,
            backlog=BACKLOG,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            ssl_keyfile_password=config.ssl_keyfile_password,
            ssl_ca_certs=config.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE,
        )

    async def _obey(self, service: Service, server: uvicorn.Server) -> None:
        """Do what the supervisor says; its end is ours."""
        loop = asyncio.get_running_loop()
        self._control.setblocking(False)
        while not server.started:
            await asyncio.sleep(0.01)
        self._row.set("heartbeat", time.monotonic())
        await loop.sock_sendall(self._control, READY)
        while True:
            words, files = await self._words()
            for file in files:
                at = words.index(ENGINE)
                await service.client.connect(words[at + 1], socket.socket(fileno=file))
                words = words[:at] + words[at + 2 :] or b" "
            if DRAIN in words:
                service.draining = True
                if any(service.client.pauses):  # else what is open could not finish
                    resuming = asyncio.create_task(service.client.order("resume"))
                    resuming.add_done_callback(lambda done: done.cancelled() or done.exception())
                asyncio.create_task(self._exit_when_idle(service, server))  # noqa: RUF006
            if not words or EXIT in words:
                service.client.fail_all("the server has shut down")
                await asyncio.sleep(0.2)  # the streams' last events
                if not words and self._responses is not None:  # the supervisor, which would do it, was killed
                    shutil.rmtree(self._responses.parent, ignore_errors=True)
                self._leave(service, server)
                return

    async def _words(self) -> tuple[bytes, list[int]]:
        """What the supervisor says next, and the sockets that come with it; nothing at its end."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()

        def wake() -> None:
            loop.remove_reader(self._control.fileno())
            readable.set_result(None)

        loop.add_reader(self._control.fileno(), wake)
        try:
            await readable
        finally:
            loop.remove_reader(self._control.fileno())
        try:
            words, files, _, _ = socket.recv_fds(self._control, 64, 16)
        except OSError:
            return b"", []
        return words, files

    async def _exit_when_idle(self, service: Service, server: uvicorn.Server) -> None:
        """New requests get 503 while the open ones finish; then the front leaves."""
        await asyncio.sleep(0.5)
        while service.client.num_open:
            await asyncio.sleep(0.05)
        self._leave(service, server)

    def _leave(self, service: Service, server: uvicorn.Server) -> None:
        service.feed.closed.set()
        server.should_exit = True

    async def _watch(self, service: Service) -> None:
        """Tell the supervisor that this loop turns; take what an engine has from it when its heart has stopped."""
        config, suspicions = self._config, [Suspicion() for _ in self._engines]
        while True:
            self._row.set("heartbeat", time.monotonic())
            await asyncio.sleep(_WATCH_SECONDS)
            for number, (row, suspicion) in enumerate(zip(self._rows.engines, suspicions, strict=True)):
                if row.get("state") == metrics.LOADING:
                    continue
                state = metrics.health(row, config.heartbeat_timeout, config.step_timeout)
                if suspicion.confirmed(state.reason):
                    service.client.lose(number, state.reason)


async def make_service(
    config: ServerConfig, model: ModelFiles, client: Engines, row: metrics.Row, feed: PoolFeed, tracer: Tracer | None
) -> Service:
    """What answers a front's requests, once its engines are ready.

    Raises:
        ModelError: the tokenizer cannot be read, or what generation_config.json says.
        EngineGone: there is no engine.
    """
    try:
        tokenizer = await asyncio.to_thread(TokenizerService, model.path, model.trust_remote_code, config.chat_template)
    except ModelError:
        # The engine reads the same tokenizer before its weights, and says what is wrong with it: once is enough.
        await client.ready()
        raise
    images = await asyncio.to_thread(image_inputs, model.path, tokenizer.tokenizer)
    defaults = generation_defaults(model.path) if config.generation_config else {}
    await client.ready()
    names = config.served_model_names or (Path(model.path).resolve().name,)
    reader = ImageReader(policy_of(config), images)
    return Service(config, client, tokenizer, row, names, model.path, defaults, feed, reader, tracer)


def make_app(service: Service, rows: metrics.Rows, responses: Path | None) -> ASGIApp:
    """The application of one front, with all its APIs.

    Args:
        service: what answers.
        rows: all processes' metrics.
        responses: the file in which all fronts keep responses; None: none is kept.
    """
    store = None if responses is None else ResponseStore(responses, service.config.response_store_size)
    more = (functools.partial(add_response_routes, store=store), add_message_routes, add_admin_routes)
    return create_app(service, rows, more)
