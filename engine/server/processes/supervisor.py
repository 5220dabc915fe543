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
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from typing import Any

from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.engine.importing import importing
from kvarena.engine.server.engine.loop import EngineLoop
from kvarena.engine.server.engine.served import ServedEngine
from kvarena.engine.server.processes.listeners import open_listeners
from kvarena.engine.server.processes.process import DRAIN, EXIT, ModelFiles, end_process, freeze_heap, start_log
from kvarena.engine.server.processes.suspicion import Suspicion
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import socket_pair
from kvarena.engine.server.shared.kv_events import KVEventsConfig
from kvarena.engine.server.shared.page import Page

logger = logging.getLogger("kvarena.supervisor")

ENGINE_FAILED, USER_ERROR = 1, 2
# After the engine's death the fronts stay up so long, so that clients and probes learn of it.
_LAST_WORDS_SECONDS = 3.0
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 6.0
# A front that ended or froze is replaced, but not over and over.
_MAX_REPLACED, _REPLACED_WITHIN_SECONDS = 3, 300.0
_MIN_SILENCE_SECONDS = 1.0

EngineFactory = Callable[[], ServedEngine]


def run_engine(
    factory: EngineFactory, fronts: list[socket.socket], control: socket.socket, page: Page, config: ServerConfig
) -> None:
    """The engine process's main function; does not return."""
    start_log()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        served = _with_feed(factory(), config.kv_events)
        loop = EngineLoop(served, fronts, control, page, config.max_num_queued_requests)
    except KvarenaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    freeze_heap()
    loop.announce()
    try:
        loop.run()
    except KvarenaError as error:
        logger.error("the engine has failed: %s", error)
        loop.close()
        sys.exit(ENGINE_FAILED)
    loop.close()
    end_process()


def _with_feed(served: ServedEngine, config: KVEventsConfig) -> ServedEngine:
    """`served`, publishing what its prefix cache holds where that is asked for. Raises ConfigError."""
    if not config.is_on:
        return served
    from kvarena.engine.server.engine.event_publisher import CacheFeed  # ZeroMQ

    try:
        feed = CacheFeed(served.engine.allocator, config.of_rank(0), 0)
    except ConfigError as error:
        raise ConfigError(served.words(str(error))) from error
    logger.info("KV events are published at %s", feed.config.endpoint)
    return replace(served, feed=feed, info=replace(served.info, kv_events=asdict(feed.config)))


def _run_front(*args: Any) -> None:
    """A front process's main function. The web framework is imported there alone: the engine starts without it."""
    with importing():
        from kvarena.engine.server.processes.front import Front
    Front(*args).main()


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
        self._suspicions = [Suspicion() for _ in range(config.num_fronts)]
        self._is_ready = [False] * config.num_fronts
        self._replaced: deque[float] = deque(maxlen=_MAX_REPLACED)
        self._processes: list[BaseProcess] = []
        self._controls: list[socket.socket] = []

    def run(self) -> int:
        """Serve; returns the exit code."""
        self._listeners = open_listeners(self._config.host, self._config.port, self._config.num_fronts)
        self._page = metrics.create_page(self._config.num_fronts)
        self._row, *self._front_rows = [metrics.Row(self._page, i) for i in range(self._config.num_fronts + 1)]
        address = self._listeners[0].getsockname()
        with self._signal_handlers():
            self._start()
            try:
                return self._supervise(address)
            finally:
                self._end_all()

    def _start(self) -> None:
        pairs = [socket_pair() for _ in self._listeners]
        control, theirs = socket_pair()
        self._controls.append(control)
        args = (self._factory, [pair[0] for pair in pairs], theirs, self._page, self._config)
        self._processes.append(self._spawn("kvarena-engine", run_engine, args))
        theirs.close()
        for index, pair in enumerate(pairs):
            process, control = self._start_front(index, pair[1])
            self._processes.append(process)
            self._controls.append(control)
        # Only the two ends may hold these, or neither learns of the other's death.
        for pair in pairs:
            for sock in pair:
                sock.close()

    def _start_front(self, index: int, engine: socket.socket) -> tuple[BaseProcess, socket.socket]:
        control, theirs = socket_pair()
        args = (index, self._config, self._model, self._listeners[index], engine, theirs, self._page)
        process = self._spawn(f"kvarena-front-{index}", _run_front, args)
        theirs.close()
        return process, control

    def _spawn(self, name: str, target: Callable[..., None], args: tuple[object, ...]) -> BaseProcess:
        process = self._context.Process(target=target, args=args, name=name, daemon=True)
        process.start()
        return process

    @property
    def _engine(self) -> BaseProcess:
        return self._processes[0]

    def _supervise(self, address: tuple[str, int]) -> int:
        if not self._wait_ready():
            return self._failed_start()
        scheme = "https" if self._config.ssl_certfile else "http"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        url = f"{scheme}://{host}:{address[1]}"
        page = f"a page to try it: {url}/, " if self._config.enable_dashboard else ""
        logger.info("%smetrics: %s/metrics, API: %s/v1", page, url, url)
        logger.info("Uvicorn running on %s (Press CTRL+C to quit)", url)
        while not self._signals:
            time.sleep(_POLL_SECONDS)
            reason = self._engine_fault() or self._replace_fronts()
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
        self._is_ready = [True] * self._config.num_fronts
        return True

    def _failed_start(self) -> int:
        if self._signals:
            return 0
        time.sleep(_POLL_SECONDS)
        for process in self._processes:
            process.join(1.0)
        codes = [process.exitcode for process in self._processes if process.exitcode]
        for process in self._processes:
            if (process.exitcode or 0) < 0:  # it could say nothing itself
                text = f"{process.name} has ended with code {process.exitcode} while it started"
                print(f"error: {text}{self._why_killed(process)}", file=sys.stderr, flush=True)
        return USER_ERROR if USER_ERROR in codes else ENGINE_FAILED

    def _engine_fault(self) -> str:
        """Why the engine cannot go on, or an empty string."""
        if not self._engine.is_alive():
            return f"the engine process has ended with code {self._engine.exitcode}{self._why_killed(self._engine)}"
        state = metrics.health(self._row, self._config.heartbeat_timeout, self._config.step_timeout)
        return state.reason if self._suspicion.confirmed(state.reason) else ""

    def _why_killed(self, process: BaseProcess) -> str:
        """What most often is behind a SIGKILL that nobody here has sent: the process itself could say nothing."""
        if process.exitcode != -signal.SIGKILL:
            return ""
        return self._model.words(
            ": killed, as a system does that is out of memory; if so, lower kv_cache.memory_gib or "
            "engine.max_model_len, or take a smaller model"
        )

    def _front_fault(self, index: int) -> str:
        """Why a front serves nobody any more, or an empty string. A front that is frozen is ended: its clients'
        connections close.
        """
        process, control = self._processes[1 + index], self._controls[1 + index]
        if not process.is_alive():
            return f"{process.name} has ended with code {process.exitcode}"
        if not self._is_ready[index]:  # one that loads its tokenizer may be silent for long
            with contextlib.suppress(BlockingIOError):
                self._is_ready[index] = bool(control.recv(1, socket.MSG_DONTWAIT))
            return ""
        silent = time.monotonic() - self._front_rows[index].get("heartbeat")
        fault = ""
        if silent > max(self._config.heartbeat_timeout, _MIN_SILENCE_SECONDS):
            fault = f"{process.name} has been silent for {silent:.1f} s"
        if not self._suspicions[index].confirmed(fault):
            return ""
        process.kill()
        process.join()
        return fault

    def _replace_fronts(self) -> str:
        """Start others in the place of fronts that ended or froze; why there will be no other, or an empty string."""
        for index in range(self._config.num_fronts):
            fault = self._front_fault(index)
            if not fault:
                continue
            now, replaced = time.monotonic(), self._replaced
            if len(replaced) == _MAX_REPLACED and now - replaced[0] < _REPLACED_WITHIN_SECONDS:
                return f"{fault}, after {_MAX_REPLACED} others in {now - replaced[0]:.0f} s"
            replaced.append(now)
            logger.error("%s: its requests end, another one starts in its place", fault)
            self._replace_front(index)
        return ""

    def _replace_front(self, index: int) -> None:
        self._front_rows[index].set("kvarena:open_requests", 0)
        self._controls[1 + index].close()
        self._suspicions[index], self._is_ready[index] = Suspicion(), False
        ours, theirs = socket_pair()
        with ours, theirs, contextlib.suppress(OSError):  # an engine that is gone is found next
            socket.send_fds(self._controls[0], [bytes([index])], [ours.fileno()])
            self._processes[1 + index], self._controls[1 + index] = self._start_front(index, theirs)

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
            faults = [self._front_fault(index) for index in range(self._config.num_fronts)]
            if all(faults):
                break
            for listener, fault in zip(self._listeners, faults, strict=True):
                if fault:
                    listener.close()  # else the kernel would go on giving it connections
            reason = self._engine_fault()
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
    start_log()
    logger.info("starting: process %d, %d front(s)", os.getpid(), config.num_fronts)
    # A connection is a file, and shells commonly allow 1,024 of them.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return Supervisor(config, model, factory).run()
