"""What the supervisor, the engine's process and the fronts' share. Imports none of what only one of them needs."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

# Words between the supervisor and a front.
READY, DRAIN, EXIT = b"R", b"D", b"X"
ENGINE = b"E"  # to a front, an engine's number behind it: with it comes a socket to one in place of another


@dataclass(frozen=True)
class ModelFiles:
    """Where the fronts find the model's tokenizer.

    Attributes:
        path: the model directory.
        trust_remote_code: allow tokenizer code that ships with it.
        words: turns the settings that an error names into the words of the command that was given; must pickle.
    """

    path: str
    trust_remote_code: bool = False
    words: Callable[[str], str] = str


class LogHandler(logging.StreamHandler):
    """Writes lines to stdout. What cannot be written there (a full disk, a closed pipe) is dropped: it is said
    once, and counted when lines can be written again.
    """

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        self._num_dropped = 0

    @override
    def emit(self, record: logging.LogRecord) -> None:
        before = self._num_dropped
        super().emit(record)
        if before and self._num_dropped == before:
            self._num_dropped = 0
            text = "%d lines before this one could not be written"
            super().emit(logging.LogRecord("kvarena.log", logging.WARNING, "", 0, text, (before,), None))

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if not self._num_dropped:
            with contextlib.suppress(OSError):  # stderr may be on the same disk
                print(f"warning: the log cannot be written: {error.strerror}; lines are dropped", file=sys.stderr)
        self._num_dropped += 1


def start_log() -> None:
    """Let this process log to stdout."""
    logging.basicConfig(level=logging.INFO, handlers=[LogHandler()])


def freeze_heap() -> None:
    """Set aside what the process holds by now: a pass of the garbage collector over the libraries' objects takes up to
    0.3 s, as long as dozens of steps. Collections then look at what was made since.
    """
    gc.collect()
    gc.freeze()


def end_process() -> None:
    """Leave at once: all is said and done, and taking the libraries' modules apart takes seconds."""
    logging.shutdown()
    with contextlib.suppress(OSError):  # the log's handler has told
        sys.stdout.flush()
    os._exit(0)
