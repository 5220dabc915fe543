"""What the supervisor, the engine's process and the fronts' share. Imports none of what only one of them needs."""

from __future__ import annotations

import gc
import logging
import os
import sys
from dataclasses import dataclass

# Words between the supervisor and a front.
READY, DRAIN, EXIT = b"R", b"D", b"X"


@dataclass(frozen=True)
class ModelFiles:
    """Where the fronts find the model's tokenizer.

    Attributes:
        path: the model directory.
        trust_remote_code: allow tokenizer code that ships with it.
    """

    path: str
    trust_remote_code: bool = False


def freeze_heap() -> None:
    """Set aside what the process holds by now: a pass of the garbage collector over the libraries' objects takes up to
    0.3 s, as long as dozens of steps. Collections then look at what was made since.
    """
    gc.collect()
    gc.freeze()


def end_process() -> None:
    """Leave at once: all is said and done, and taking the libraries' modules apart takes seconds."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
