"""Starts the engine and the fronts, watches them, drains on SIGTERM, and ends with an honest exit code.

0   drained after SIGTERM or Ctrl-C
1   the engine died, froze or failed
2   a wrong setting or model: one line says which
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, KvarenaError
from engine.importing import importing
from engine.server import metrics
from engine.server.config import ServerConfig
from engine.server.engine_loop import EngineLoop
from engine.server.ipc import socket_pair
from engine.server.process import DRAIN, EXIT, ModelFiles, end_process, freeze_heap
from engine.server.served import ServedEngine
from engine.server.suspicion import Suspicion

logger = logging.getLogger("kvarena.supervisor")

ENGINE_FAILED, USER_ERROR = 1, 2
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
# After the engine's death the fronts stay up so long, so that clients and probes learn of it.
_LAST_WORDS_SECONDS = 3.0
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 6.0

EngineFactory = Callable[[], ServedEngine]


def run_engine(
    factory: EngineFactory,
    fronts: list[socket.socket],
    control: socket.socket,
    page: Path,
    max_num_queued_requests: int,
) -> None:
    """The engine process's main function; does not return."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stdout)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        loop = EngineLoop(factory(), fronts, control, page, max_num_queued_requests)
    except KvarenaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    freeze_heap()
    loop.announce()
    try:
        loop.run()
    except KvarenaError as error:
        logger.error("the engine has failed: %s", error)
        sys.exit(ENGINE_FAILED)
    end_process()


def _run_front(*args: Any) -> None:
    """A front process's main function. The web framework is imported there alone: the engine starts without it."""
    with importing():
        from engine.server.front import run_front
    run_front(*args)


def open_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets bound to one address, among which the kernel deals connections out.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    family, _, _, _, address = _resolve(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Without SO_REUSEPORT: a second server on this port must fail, not share it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        address = probe.getsockname()
        if port:
            probe.listen(1)
    listeners = []
    for _ in range(count):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        listeners.append(sock)
    return listeners


def _resolve(host: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]  # type: ignore[return-value]
    except OSError as error:
        raise ConfigError(f"cannot resolve host {host!r}: {error}") from error


class Supervisor:
    """One server: an engine process, its fronts, and this process.

    Args:
        config: the server's settings.
        model: where the fronts find the tokenizer.
        factory: builds the engine, in the engine's process; must pickle.
    """

    def __init__(self, config: ServerConfig, model: ModelFiles, factory: EngineFactory) -> None:
        self._config, self._model, self._factory = config, model, factory
        self._signals = 0
        self._suspicion = Suspicion()
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._controls: list[socket.socket] = []

    def run(self) -> int:
        """Serve; returns the exit code."""
        listeners = open_listeners(self._config.host, self._config.port, self._config.num_fronts)
        with tempfile.TemporaryDirectory(prefix="kvarena-") as folder, self._signal_handlers():
            page = Path(folder) / "metrics"
            metrics.create_page(page, self._config.num_fronts)
            self._row = metrics.Row(page, 0)
            self._start(listeners, page)
            try:
                return self._supervise(listeners[0].getsockname())
            finally:
                self._end_all()

    def _start(self, listeners: list[socket.socket], page: Path) -> None:
        pairs = [socket_pair() for _ in listeners]
        control, theirs = socket_pair()
        self._controls.append(control)
        args = (self._factory, [pair[0] for pair in pairs], theirs, page, self._config.max_num_queued_requests)
        self._spawn("kvarena-engine", run_engine, args)
        theirs.close()
        for index, (listener, pair) in enumerate(zip(listeners, pairs, strict=True)):
            control, theirs = socket_pair()
            self._controls.append(control)
            front_args = (index, self._config, self._model, listener, pair[1], theirs, page)
            self._spawn(f"kvarena-front-{index}", _run_front, front_args)
            theirs.close()
        # Only the two ends may hold these, or neither learns of the other's death.
        for pair in pairs:
            for sock in pair:
                sock.close()

    def _spawn(self, name: str, target: Callable[..., None], args: tuple[object, ...]) -> None:
        process = self._context.Process(target=target, args=args, name=name, daemon=True)
        process.start()
        self._processes.append(process)

    @property
    def _engine(self) -> BaseProcess:
        return self._processes[0]

    def _supervise(self, address: tuple[str, int]) -> int:
        if not self._wait_ready():
            return self._failed_start()
        scheme = "https" if self._config.ssl_certfile else "http"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        logger.info("Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", scheme, host, address[1])
        while not self._signals:
            time.sleep(_POLL_SECONDS)
            reason = self._fault()
            if reason:
                return self._last_words(reason)
        return self._drain()

    def _wait_ready(self) -> bool:
        """Wait until every front answers. False: a process has ended, or a signal came."""
        waiting = set(self._controls[1:])
        with selectors.DefaultSelector() as selector:
            for control in waiting:
                selector.register(control, selectors.EVENT_READ, control)
            while waiting:
                if self._signals or not all(process.is_alive() for process in self._processes):
                    return False
                for key, _ in selector.select(_POLL_SECONDS):
                    control = key.data
                    if not control.recv(1):
                        return False
                    selector.unregister(control)
                    waiting.discard(control)
        return True

    def _failed_start(self) -> int:
        if self._signals:
            return 0
        time.sleep(_POLL_SECONDS)
        for process in self._processes:
            process.join(1.0)
        codes = [process.exitcode for process in self._processes if process.exitcode]
        return USER_ERROR if USER_ERROR in codes else ENGINE_FAILED

    def _fault(self) -> str:
        """Why the server cannot go on, or an empty string."""
        if not self._engine.is_alive():
            return f"the engine process has ended with code {self._engine.exitcode}"
        state = metrics.health(self._row, self._config.heartbeat_timeout, self._config.step_timeout)
        if self._suspicion.confirmed(state.reason):
            return state.reason
        for process in self._processes[1:]:
            if not process.is_alive():
                return f"{process.name} has ended with code {process.exitcode}"
        return ""

    def _last_words(self, reason: str) -> int:
        """The engine is gone: the fronts tell their clients, then all ends."""
        logger.error("shutting down: %s", reason)
        self._row.set("state", metrics.FAILED)
        self._engine.kill()
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and self._signals < 2:
            time.sleep(_POLL_SECONDS)
        self._tell(EXIT)
        self._join(self._processes[1:], _EXIT_SECONDS)
        return ENGINE_FAILED

    def _drain(self) -> int:
        """Refuse new requests and let the open ones finish, up to `shutdown_timeout` or a second signal."""
        logger.info("shutting down: open requests may finish for %g s", self._config.shutdown_timeout)
        self._tell(DRAIN)
        deadline = time.monotonic() + self._config.shutdown_timeout
        while time.monotonic() < deadline and self._signals < 2:
            if not any(process.is_alive() for process in self._processes[1:]):
                break
            reason = self._fault() if all(p.is_alive() for p in self._processes[1:]) else ""
            if reason:
                return self._last_words(reason)
            time.sleep(_POLL_SECONDS / 2)
        self._tell(EXIT)
        self._join(self._processes[1:], _EXIT_SECONDS)
        return 0

    def _tell(self, word: bytes) -> None:
        for control in self._controls[1:]:
            with contextlib.suppress(OSError):
                control.send(word)

    def _join(self, processes: list[BaseProcess], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _end_all(self) -> None:
        """Leave no child behind."""
        for control in self._controls:
            control.close()
        self._join(self._processes, 3.0)
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def count(number: int, frame: object) -> None:  # noqa: ARG001
            self._signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(config: ServerConfig, model: ModelFiles, factory: EngineFactory) -> int:
    """Run a server until it is told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stdout)
    logger.info("starting: process %d, %d front(s)", os.getpid(), config.num_fronts)
    # A connection is a file, and shells commonly allow 1,024 of them.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return Supervisor(config, model, factory).run()
