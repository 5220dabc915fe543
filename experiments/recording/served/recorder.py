"""The engine's side of a server's recording: notes what happens in a step, and hands it on every few seconds.

    loop, engine --hooks--> ServedRecorder --frames--> thread --pipe--> writer, a process of its own

The step's thread pays for the notes (`run.recording` of the manifest says how much); pickling and the pipe are a
thread's, files another process's. Whatever goes wrong here ends the recording, and nobody's answer.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import FinishReason, Request
from kvarena.experiments.caching.accesses import watch
from kvarena.experiments.recording.kv_map import KVMapRecorder
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.recording.served.accesses import Accesses
from kvarena.experiments.recording.served.log import ServedLog
from kvarena.experiments.recording.served.window import Frame
from kvarena.experiments.recording.served.writer import GOODBYE, Opening, packed

logger = logging.getLogger("kvarena.engine")

FLUSH_SECONDS = 2.0
MOST_WAITING = 60  # frames: a writer that is further behind is given up
MAP_SECONDS, MAP_SHARE = 1.0, 0.001  # between snapshots, and the time that they may take
CLOSE_SECONDS = 60.0
# Imported, not run as a module: what is unpickled must be of the classes that it knows.
WRITER = "import sys; from kvarena.experiments.recording.served.writer import main; sys.exit(main(sys.argv[1:]))"


class WriterProcess:
    """The process that writes, and the thread that feeds it.

    Args:
        folder: of the recording.
    """

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self.fault = ""
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Send an object; `fault` tells where that is no use any more."""
        with self._changed:
            self._waiting.append(message)
            if len(self._waiting) > MOST_WAITING and not self.fault:
                self.fault = f"its writer is {len(self._waiting)} frames behind"
            self._changed.notify()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what waits and let the process end, for so many seconds at most; it goes on by itself after that."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.warning("the recording's files are still being written by process %d", self._process.pid)

    def _run(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            with pipe:
                while (message := self._next()) is not None:
                    pipe.write(packed(message))
                    pipe.flush()
        except OSError as error:
            self.fault = f"its writer has ended ({error.strerror})"

    def _next(self) -> Any:
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            return self._waiting.popleft()


class ServedRecorder:
    """Records what a server's engine does.

    Args:
        engine: that the loop steps; its steps are told of as they are launched from here on.
        opening: of the recording.
        writer: gets it.

    Attributes:
        is_on: False once something went wrong.
    """

    def __init__(self, engine: Engine, opening: Opening, writer: WriterProcess) -> None:
        self._engine, self._writer = engine, writer
        self._log = ServedLog()
        self._rows = RunRecorder(log=self._log)
        self._ledger = MemoryLedger()
        self._map = KVMapRecorder(
            engine.allocator, self._log.rows.__getitem__, max_share=MAP_SHARE, interval=MAP_SECONDS
        )
        self._accesses: Accesses | None = None
        log = watch(engine.allocator, engine.clock.now, self._log.rows.__getitem__)
        if log is not None:
            self._accesses = engine.allocator.observer = Accesses(log, self._give_up)
        self._first = engine.num_steps
        self._ordinals = array("q")
        self._seconds = 0.0
        self._processor = time.process_time()
        self._due = time.perf_counter() + FLUSH_SECONDS
        self.is_on = True
        engine.on_launch = self.on_launch
        writer.put(opening)

    def on_submit(self, req: Request, now: float) -> None:
        """`req` is handed to the engine at `now`."""
        self._note(lambda: self._rows.on_submit(req, now))

    def on_refused(self, req: Request, now: float, error: str) -> None:
        """The engine would not take it."""
        self._note(lambda: self._rows.on_rejected(req, now, error))

    def on_left(self, req: Request, *, stopped: bool = False) -> None:
        """`req` ended outside of a step: its client left, its text is complete (`stopped`), or its step failed."""
        reason = FinishReason.STOP.value if stopped else None
        now = self._engine.clock.now()

        def note() -> None:
            if self._log.is_open(req):
                self._log.end(req, now, reason)
                self._rows.on_left(req)

        self._note(note)

    def on_launch(self, step: StepOutput) -> None:
        """A step is about to be launched."""
        if not self.is_on:
            return
        start = time.perf_counter()
        try:
            self._ledger.observe(step.plan, step.usage)
            self._map.on_launch(step)
        except Exception as error:
            self._give_up(error)
        self._seconds += time.perf_counter() - start

    def on_step(self, step: StepOutput) -> None:
        """A step has ended."""
        if not self.is_on:
            return
        start = time.perf_counter()
        try:
            self._rows.on_step(step)
            self._ordinals.append(step.index - self._first)
        except Exception as error:
            self._give_up(error)
        self._seconds += time.perf_counter() - start

    def turn(self) -> None:
        """Between two steps: hand on what there is, when it is time."""
        now = time.perf_counter()
        if self.is_on and now >= self._due:
            self._note(self._flush)
            self._due = now + FLUSH_SECONDS
            if self._writer.fault:
                self._give_up(RuntimeError(self._writer.fault))

    def close(self) -> None:
        """The server ends: the files are written when this returns, or soon after."""
        if self.is_on:
            self._note(self._flush)
            self._writer.put(GOODBYE)
        self._writer.close()

    def _note(self, note: Callable[[], None]) -> None:
        if not self.is_on:
            return
        start = time.perf_counter()
        try:
            note()
        except Exception as error:
            self._give_up(error)
        self._seconds += time.perf_counter() - start

    def _flush(self) -> None:
        submitted, progress = self._log.take(self._engine.clock.now())
        ledger = self._ledger.take()
        if not (submitted or progress or len(self._ordinals) or len(ledger.columns["total"])):
            return
        steps, token_times = self._rows.take_steps()
        ordinals, self._ordinals = np.array(self._ordinals, dtype=np.int64), array("q")
        snapshots = [one | {"step": one["step"] - self._first} for one in self._map.take()]
        seconds = self._seconds + (0.0 if self._accesses is None else self._accesses.seconds)
        times = seconds, time.process_time() - self._processor
        accesses = None if self._accesses is None else self._accesses.take()
        residents = self._map.residents()
        self._writer.put(
            Frame(ordinals, steps, token_times, ledger, snapshots, residents, submitted, progress, accesses, *times)
        )

    def _give_up(self, error: Exception) -> None:
        """Nothing more is recorded. The trace is for whoever mends it: the server goes on."""
        self.is_on = False
        self._engine.on_launch = None
        if self._accesses is not None:
            self._accesses.stop()
        is_told = isinstance(error, RuntimeError)
        logger.error("the recording has ended: %s", error, exc_info=None if is_told else error)
