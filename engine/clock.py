"""Clocks. The engine takes one; nobody else reads the wall."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the clock was made or reset."""

    def now(self) -> float:
        """Seconds since the start."""
        ...

    def reset(self) -> None:
        """Make this moment second 0."""
        ...

    def sleep_until(self, when: float) -> None:
        """Return once `now() >= when`; at once if that is past."""
        ...


class MovableClock(Clock, Protocol):
    """A clock that whoever computes nothing moves on by itself."""

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` >= 0."""
        ...


class WallClock:
    """Real time, from a monotonic counter."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Seconds since the clock was made or last reset."""
        return time.perf_counter() - self._origin

    def reset(self) -> None:
        """Make this moment second 0 (after a warm-up)."""
        self._origin = time.perf_counter()

    def sleep_until(self, when: float) -> None:
        """Sleep until `when`."""
        delay = when - self.now()
        if delay > 0:
            time.sleep(delay)


class VirtualClock:
    """Simulated time: moves only when told to. A simulated runner advances it by its step time."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Simulated seconds."""
        return self._now

    def reset(self) -> None:
        """Back to second 0."""
        self._now = 0.0

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` >= 0."""
        self._now += seconds

    def sleep_until(self, when: float) -> None:
        """Jump to `when` if it lies ahead."""
        self._now = max(self._now, when)
