"""Starts the engines and the fronts, watches them, drains on SIGTERM, and ends with an honest exit code.

0   drained after SIGTERM or Ctrl-C
1   the engine died, froze or failed; of several engines, the last one
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

from kvarena.engine.importing import importing
from kvarena.engine.routing import Router
from kvarena.engine.server.processes.engine import ENGINE_FAILED, USER_ERROR, EngineFactory, Place, run_engine
from kvarena.engine.server.processes.listeners import open_listeners
from kvarena.engine.server.processes.parts import Part, Replacements
from kvarena.engine.server.processes.process import DRAIN, ENGINE, EXIT, ModelFiles, start_log
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import socket_pair

logger = logging.getLogger("kvarena.supervisor")

# After the last engine's death the fronts stay up so long, so that clients and probes learn of it.
_LAST_WORDS_SECONDS = 3.0
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 6.0
_END_SECONDS = 3.0
_RECORDED_SECONDS = 60.0  # the same, where an hour's files may have to be written
_MIN_SILENCE_SECONDS = 1.0

Sockets = tuple[socket.socket, socket.socket]


def _run_front(*args: Any) -> None:
    """A front process's main function. The web framework is imported there alone: the engine starts without it."""
    try:
        with importing():
            from kvarena.engine.server.processes.front import Front
    except ImportError as error:
        if (error.name or "").startswith("kvarena."):
            raise
        sys.exit(
            f"error: front {args[0]} cannot start, for {sys.executable} lacks what its packages need ({error}); "
            "install kvarena[serve] with all that it brings: python -m pip install 'kvarena[serve]'"
        )
    Front(*args).main()


class Supervisor:
    """One server: its engines, its fronts, and this process.

    Args:
        config: the server's settings.
        model: where the fronts find the tokenizer.
        factory: builds an engine, in the engine's process; must pickle.
        router: picks an engine for each prompt; each front has a copy. None: there is one engine.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelFiles,
        factory: EngineFactory,
        router: Router | None = None,
    ) -> None:
        self._config, self._model, self._factory, self._router = config, model, factory, router
        self._num_engines = router.num_replicas if router is not None else 1
        self._signals = 0
        self._context = multiprocessing.get_context("spawn")
        self._replaced_fronts = Replacements()
        self._replaced_engines = [Replacements() for _ in range(self._num_engines)]
        self._engines: list[Part | None] = []  # None: one that never lasts, and was given up
        self._fronts: list[Part] = []
        self._responses: Path | None = None

    def run(self) -> int:
        """Serve; returns the exit code."""
        config = self._config
        self._listeners = open_listeners(config.host, config.port, config.num_fronts)
        self._page = metrics.create_page(config.num_fronts, self._num_engines)
        self._rows = metrics.Rows(self._page, config.num_fronts, self._num_engines)
        address = self._listeners[0].getsockname()
        with self._signal_handlers(), tempfile.TemporaryDirectory(prefix="kvarena-") as folder:
            # The fronts share what responses can be asked for again; it ends with the server.
            self._responses = Path(folder) / "responses.sqlite" if config.response_store_size else None
            self._start()
            try:
                return self._supervise(address)
            finally:
                self._end_all()

    def _start(self) -> None:
        pairs = [[socket_pair() for _ in self._listeners] for _ in self._rows.engines]
        for number, to_fronts in enumerate(pairs):
            self._engines.append(self._start_engine(number, [pair[0] for pair in to_fronts]))
        for index in range(len(self._listeners)):
            self._fronts.append(self._start_front(index, [to_fronts[index][1] for to_fronts in pairs]))
        # Only the two ends may hold these, or neither learns of the other's death.
        _close(pair for to_fronts in pairs for pair in to_fronts)

    def _start_engine(self, number: int, fronts: list[socket.socket]) -> Part:
        control, theirs = socket_pair()
        place = Place(number, self._num_engines)
        args = (self._factory, place, fronts, theirs, self._page, self._config)
        process = self._spawn(self._engine_name(number), run_engine, args)
        theirs.close()
        return Part(process, control, self._rows.engines[number])

    def _engine_name(self, number: int) -> str:
        return "kvarena-engine" if self._num_engines == 1 else f"kvarena-engine-{number}"

    def _start_front(self, index: int, engines: list[socket.socket]) -> Part:
        control, theirs = socket_pair()
        args = (
            index, self._config, self._model, self._listeners[index], engines, theirs, self._page, self._router,
            self._responses,
        )  # fmt: skip
        process = self._spawn(f"kvarena-front-{index}", _run_front, args)
        theirs.close()
        return Part(process, control, self._rows.fronts[index][0])

    def _spawn(self, name: str, target: Callable[..., None], args: tuple[object, ...]) -> BaseProcess:
        process = self._context.Process(target=target, args=args, name=name, daemon=True)
        process.start()
        return process

    @property
    def _parts(self) -> list[Part]:
        """All that run, the engines first."""
        return [*(engine for engine in self._engines if engine is not None), *self._fronts]

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
            reason = self._replace_engines() or self._replace_fronts()
            if reason:
                return self._last_words(reason)
        return self._drain()

    def _wait_ready(self) -> bool:
        """Wait until every front answers, for every engine. False: a process has ended, or a signal came."""
        waiting = {front.control for front in self._fronts}
        with selectors.DefaultSelector() as selector:
            for control in waiting:
                selector.register(control, selectors.EVENT_READ, control)
            while waiting or any(row.get("state") == metrics.LOADING for row in self._rows.engines):
                if self._signals or not all(part.process.is_alive() for part in self._parts):
                    return False
                for key, _ in selector.select(_POLL_SECONDS):
                    control = key.data
                    if not control.recv(1):
                        return False
                    selector.unregister(control)
                    waiting.discard(control)
        for front in self._fronts:
            front.is_ready = True
        return True

    def _failed_start(self) -> int:
        if self._signals:
            return 0
        time.sleep(_POLL_SECONDS)
        processes = [part.process for part in self._parts]
        for process in processes:
            process.join(1.0)
        codes = [process.exitcode for process in processes if process.exitcode]
        for process in processes:
            if (process.exitcode or 0) < 0:  # it could say nothing itself
                text = f"{process.name} has ended with code {process.exitcode} while it started"
                print(f"error: {text}{self._why_killed(process)}", file=sys.stderr, flush=True)
        return USER_ERROR if USER_ERROR in codes else ENGINE_FAILED

    # Engines.

    def _engine_fault(self, engine: Part) -> str:
        """Why an engine cannot go on, or an empty string."""
        process = engine.process
        if not process.is_alive():
            which = "the engine process" if self._num_engines == 1 else process.name
            return f"{which} has ended with code {process.exitcode}{self._why_killed(process)}"
        if engine.row.get("state") == metrics.LOADING:
            return ""
        state = metrics.health(engine.row, self._config.heartbeat_timeout, self._config.step_timeout)
        return state.reason if engine.suspicion.confirmed(state.reason) else ""

    def _why_killed(self, process: BaseProcess) -> str:
        """What most often is behind a SIGKILL that nobody here has sent: the process itself could say nothing."""
        if process.exitcode != -signal.SIGKILL:
            return ""
        return self._model.words(
            ": killed, as a system does that is out of memory; if so, lower kv_cache.memory_gib or "
            "engine.max_model_len, or take a smaller model"
        )

    def _replace_engines(self) -> str:
        """Start others in the place of engines that ended or froze; why there is none any more, or an empty string.

        An only engine is not replaced: whoever runs the server learns of it from the exit code.
        """
        for number, engine in enumerate(self._engines):
            fault = self._engine_fault(engine) if engine is not None else ""
            if not fault:
                continue
            assert engine is not None
            if len(self._engines) == 1:
                return fault
            engine.process.kill()
            engine.process.join()
            engine.control.close()
            engine.row.forget()
            refused = self._replaced_engines[number].refused()
            if refused:
                logger.error("engine %d: %s, %s: no other one is started", number, fault, refused)
                self._engines[number] = None
                engine.row.set("state", metrics.FAILED)
                if not any(self._engines):
                    return f"{fault}, {refused}"
                continue
            logger.error("engine %d: %s: another one starts in its place", number, fault)
            self._replace_engine(number)
        return ""

    def _replace_engine(self, number: int) -> None:
        self._rows.engines[number].inc("kvarena:engine_restarts")
        pairs = [socket_pair() for _ in self._fronts]
        self._engines[number] = self._start_engine(number, [pair[0] for pair in pairs])
        for front, (_, theirs) in zip(self._fronts, pairs, strict=True):
            with contextlib.suppress(OSError):  # a front that is gone is found next
                socket.send_fds(front.control, [ENGINE + bytes([number])], [theirs.fileno()])
        _close(pairs)

    # Fronts.

    def _front_fault(self, front: Part) -> str:
        """Why a front serves nobody any more, or an empty string. A front that is frozen is ended: its clients'
        connections close.
        """
        process = front.process
        if not process.is_alive():
            return f"{process.name} has ended with code {process.exitcode}"
        if not front.is_ready:  # one that loads its tokenizer may be silent for long
            with contextlib.suppress(BlockingIOError):
                front.is_ready = bool(front.control.recv(1, socket.MSG_DONTWAIT))
            return ""
        silent = time.monotonic() - front.row.get("heartbeat")
        fault = ""
        if silent > max(self._config.heartbeat_timeout, _MIN_SILENCE_SECONDS):
            fault = f"{process.name} has been silent for {silent:.1f} s"
        if not front.suspicion.confirmed(fault):
            return ""
        process.kill()
        process.join()
        return fault

    def _replace_fronts(self) -> str:
        """Start others in the place of fronts that ended or froze; why there will be no other, or an empty string."""
        for index, front in enumerate(self._fronts):
            fault = self._front_fault(front)
            if not fault:
                continue
            refused = self._replaced_fronts.refused()
            if refused:
                return f"{fault}, {refused}"
            logger.error("%s: its requests end, another one starts in its place", fault)
            self._replace_front(index)
        return ""

    def _replace_front(self, index: int) -> None:
        for row in self._rows.fronts[index]:
            row.forget()
        self._fronts[index].control.close()
        pairs = [socket_pair() for _ in self._engines]
        for engine, (ours, _) in zip(self._engines, pairs, strict=True):
            if engine is not None:
                with contextlib.suppress(OSError):  # an engine that is gone is found next
                    socket.send_fds(engine.control, [bytes([index])], [ours.fileno()])
        self._fronts[index] = self._start_front(index, [theirs for _, theirs in pairs])
        _close(pairs)

    # The end.

    def _last_words(self, reason: str) -> int:
        """The engines are gone: the fronts tell their clients, then all ends."""
        logger.error("shutting down: %s", reason)
        for row in self._rows.engines:
            row.set("state", metrics.FAILED)
        for engine in self._engines:
            if engine is not None:
                engine.process.kill()
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and self._signals < 2:
            time.sleep(_POLL_SECONDS)
        self._leave()
        return ENGINE_FAILED

    def _drain(self) -> int:
        """Refuse new requests and let the open ones finish, up to `shutdown_timeout` or a second signal."""
        logger.info("shutting down: open requests may finish for %g s", self._config.shutdown_timeout)
        self._tell(DRAIN)
        deadline = time.monotonic() + self._config.shutdown_timeout
        while time.monotonic() < deadline and self._signals < 2:
            faults = [self._front_fault(front) for front in self._fronts]
            if all(faults):
                break
            for listener, fault in zip(self._listeners, faults, strict=True):
                if fault:
                    listener.close()  # else the kernel would go on giving it connections
            reasons = [self._engine_fault(engine) if engine is not None else "it was lost" for engine in self._engines]
            if all(reasons):
                return self._last_words(reasons[0])
            time.sleep(_POLL_SECONDS / 2)
        self._leave()
        return 0

    def _leave(self) -> None:
        self._tell(EXIT)
        _join([front.process for front in self._fronts], _EXIT_SECONDS)

    def _tell(self, word: bytes) -> None:
        for front in self._fronts:
            with contextlib.suppress(OSError):
                front.control.send(word)

    def _end_all(self) -> None:
        """Leave no child behind."""
        for part in self._parts:
            part.control.close()
        processes = [part.process for part in self._parts]
        _join(processes, _END_SECONDS if self._config.record is None else _RECORDED_SECONDS)
        for process in processes:
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


def _close(pairs: Iterator[Sockets] | list[Sockets]) -> None:
    for pair in pairs:
        for sock in pair:
            sock.close()


def _join(processes: list[BaseProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def serve(config: ServerConfig, model: ModelFiles, factory: EngineFactory, router: Router | None = None) -> int:
    """Run a server until it is told to stop; returns the exit code. The arguments are those of `Supervisor`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    start_log()
    engines = f"{router.num_replicas} engines, " if router is not None else ""
    logger.info("starting: process %d, %s%d front(s)", os.getpid(), engines, config.num_fronts)
    # A connection is a file, and shells commonly allow 1,024 of them.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return Supervisor(config, model, factory, router).run()
