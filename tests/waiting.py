"""How tests wait: for something that happens, never for a time in which it ought to have."""

from __future__ import annotations

import time
from collections.abc import Callable

# Bounds every wait: what is waited for takes a moment, on a busy machine many times as long. Nothing is timed by it.
PATIENCE = 180.0


def wait_for(condition: Callable[[], object], what: str, every: float = 0.05) -> None:
    """Return when `condition` holds; `what` is what the test fails with after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(every)
