"""A front process: HTTP in, the engine's tokens out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import uvicorn

from kvarena.engine.errors import KvarenaError, ModelError
from kvarena.engine.server.api.app import create_app
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.api.tracing import Tracer
from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.front.connection import BoundedConnection
from kvarena.engine.server.front.dashboard import PoolFeed
from kvarena.engine.server.front.groups import EngineGone
from kvarena.engine.server.media.parts import policy_of
from kvarena.engine.server.media.reader import ImageReader, image_inputs
from kvarena.engine.server.processes.listeners import BACKLOG
from kvarena.engine.server.processes.process import DRAIN, EXIT, READY, ModelFiles, end_process, freeze_heap, start_log
from kvarena.engine.server.processes.suspicion import Suspicion
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
        engine: to the engine's process.
        control: to the supervisor.
        page: the shared metrics.
    """

    def __init__(
        self,
        index: int,
        config: ServerConfig,
        model: ModelFiles,
        listener: socket.socket,
        engine: socket.socket,
        control: socket.socket,
        page: Page,
    ) -> None:
        self._config, self._model = config, model
        self._listener, self._engine, self._control = listener, engine, control
        self._rows = [metrics.Row(page, i) for i in range(config.num_fronts + 1)]
        self._row = self._rows[index + 1]

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
        client = await EngineClient.connect(self._engine, self._row, config.max_stream_lag, feed.publish)
        try:
            tokenizer = await asyncio.to_thread(
                TokenizerService, self._model.path, self._model.trust_remote_code, config.chat_template
            )
        except ModelError:
            # The engine reads the same tokenizer before its weights, and says what is wrong with it: once is enough.
            await client.ready
            raise
        images = await asyncio.to_thread(image_inputs, self._model.path, tokenizer.tokenizer)
        defaults = generation_defaults(self._model.path) if config.generation_config else {}
        await client.ready
        tracer = Tracer(config.otlp_endpoint) if config.otlp_endpoint else None
        names = config.served_model_names or (Path(self._model.path).resolve().name,)
        feed.attach(client, self._rows, names[0])
        service = Service(
            config,
            client,
            tokenizer,
            self._row,
            self._rows[0],
            names,
            self._model.path,
            defaults,
            feed,
            ImageReader(policy_of(config), images),
            tracer,
        )
        server = _Server(self._uvicorn_config(create_app(service, self._rows)))
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
            words = await loop.sock_recv(self._control, 64)
            if DRAIN in words:
                service.draining = True
                asyncio.create_task(self._exit_when_idle(service, server))  # noqa: RUF006
            if not words or EXIT in words:
                service.client.fail_all("the server has shut down")
                await asyncio.sleep(0.2)  # the streams' last events
                self._leave(service, server)
                return

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
        """Tell the supervisor that this loop turns; end all streams when the engine's heart has stopped."""
        config, suspicion = self._config, Suspicion()
        while True:
            self._row.set("heartbeat", time.monotonic())
            await asyncio.sleep(_WATCH_SECONDS)
            state = metrics.health(self._rows[0], config.heartbeat_timeout, config.step_timeout)
            if suspicion.confirmed(state.reason):
                service.client.fail_all(state.reason)
