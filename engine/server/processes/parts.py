"""A process of a server, as the supervisor holds it."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from kvarena.engine.server.processes.suspicion import Suspicion
from kvarena.engine.server.shared.metrics import Row

# What ended or froze is replaced, but not over and over.
MAX_REPLACED, REPLACED_WITHIN_SECONDS = 3, 300.0


@dataclass
class Part:
    """An engine or a front.

    Attributes:
        process: itself.
        control: the supervisor's socket to it.
        row: where its heart beats.
        suspicion: of what lasts.
        is_ready: it has said so.
    """

    process: BaseProcess
    control: socket.socket
    row: Row
    suspicion: Suspicion = field(default_factory=Suspicion)
    is_ready: bool = False


class Replacements:
    """How often something was replaced lately.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._times = now, deque[float](maxlen=MAX_REPLACED)

    def refused(self) -> str:
        """Count one more; why it is one too many, or an empty string."""
        now = self._now()
        if len(self._times) == MAX_REPLACED and now - self._times[0] < REPLACED_WITHIN_SECONDS:
            return f"after {MAX_REPLACED} others in {now - self._times[0]:.0f} s"
        self._times.append(now)
        return ""
