"""How far a job is, on stderr: a bar on a terminal; elsewhere a line now and then, for a bar is carriage returns."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from tqdm import tqdm

from kvarena.experiments.load.driver import Progressed

REFRESH = 0.1  # s; to write a number that nobody can read yet would take longer than the step itself may
LINE_EVERY = 30.0  # s between lines
Item = TypeVar("Item")


class Bar(Protocol):
    """What of tqdm's bar is used here."""

    n: float
    total: float | None

    def update(self, n: float | None = 1) -> bool | None:
        """So many more are done."""
        ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """What is said beside the number."""
        ...

    def close(self) -> None:
        """Leave it as it stands."""
        ...


class Lines:
    """A bar's words as lines: one now and then, and one at the end."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.n: float = 0
        self.total: float | None = total
        self._name, self._unit, self._beside = name, unit, ""
        self._due = time.monotonic() + LINE_EVERY
        self._said = False

    def update(self, n: float | None = 1) -> None:
        """So many more are done."""
        self.n += n or 0
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LINE_EVERY
            self._say()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:  # noqa: ARG002 (as of tqdm)
        """What is said beside the number."""
        self._beside = s

    def close(self) -> None:
        """The last line."""
        if not self._said:
            self._said = True
            self._say()

    def _say(self) -> None:
        beside = f", {self._beside}" if self._beside else ""
        print(f"{self._name}: {self.n:,.0f} of {self.total:,.0f} {self._unit}{beside}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether a person looks at stderr, and no log or pipe."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(name: str, total: int, unit: str, *, enabled: bool) -> Bar:
    """A bar on a terminal, lines elsewhere; nothing where it is not enabled."""
    if enabled and not on_terminal():
        return Lines(name, total, unit)
    return tqdm(total=total, desc=name, unit=unit, file=sys.stderr, disable=not enabled, dynamic_ncols=True)


def tracked(items: Iterable[Item], name: str, total: int, unit: str) -> Iterator[Item]:
    """`items`, and how many of them have been done."""
    bar = progress_bar(name, total, unit, enabled=True)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()


class Progress:
    """How many requests have finished, with the output rate beside it."""

    def __init__(self, name: str, num_requests: int, enabled: bool) -> None:
        self._bar = progress_bar(name, num_requests, "requests", enabled=enabled)
        self._due = 0.0 if enabled else math.inf

    def __call__(self, recorder: Progressed) -> None:
        """Show where the run is, now and then."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + REFRESH
        self._show(recorder)

    def finish(self, recorder: Progressed) -> None:
        """Show where the run ended, and leave it so."""
        self._show(recorder)
        self._bar.close()

    def _show(self, recorder: Progressed) -> None:
        if recorder.wall_time > 0:
            rate = recorder.num_output_tokens / recorder.wall_time
            self._bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
        self._bar.update(recorder.num_finished - self._bar.n)


class HttpProgress:
    """How many requests are answered."""

    def __init__(self, name: str, num_requests: int, enabled: bool) -> None:
        self._bar = progress_bar(name, num_requests, "requests", enabled=enabled)

    def __call__(self, num_ended: int) -> None:
        """Show how many requests have ended; the last one closes the bar."""
        self._bar.update(num_ended - self._bar.n)
        if num_ended == self._bar.total:
            self._bar.close()
