"""When to believe that the engine is silent."""

from __future__ import annotations

import time

_SECONDS = 1.0
_LOOKS = 5


class Suspicion:
    """Believes a fault that lasts while the watcher itself runs.

    A machine that stood still (a paused VM, a storm of swapping) and a server that was stopped and goes on (Ctrl-Z, fg)
    silence the engine and its watcher alike. Once both run again, the engine's heart beats within a fraction of a
    second; only an engine that stays silent under the watcher's eyes is frozen.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._num_looks = 0

    def confirmed(self, fault: str) -> bool:
        """Take one look's finding, an empty string when all is well; True once a fault has lasted."""
        if not fault:
            self._num_looks = 0
            return False
        if not self._num_looks:
            self._since = time.monotonic()
        self._num_looks += 1
        return self._num_looks >= _LOOKS and time.monotonic() - self._since >= _SECONDS
