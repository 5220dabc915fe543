"""What a job prints: progress on stderr, a table and at last one line of JSON on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from experiments.load.driver import Recorder

REFRESH = 0.1  # s; to write a number that nobody can read yet would take longer than the step itself may


class Progress:
    """A progress bar over finished requests, with the output rate beside it."""

    def __init__(self, name: str, num_requests: int, enabled: bool) -> None:
        self._bar = tqdm(
            total=num_requests, desc=name, unit="req", file=sys.stderr, disable=not enabled, dynamic_ncols=True
        )
        self._due = 0.0 if enabled else math.inf

    def __call__(self, recorder: Recorder) -> None:
        """Show where the run is, now and then."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + REFRESH
        self._show(recorder)

    def finish(self, recorder: Recorder) -> None:
        """Show where the run ended, and leave the bar as it stands."""
        self._show(recorder)
        self._bar.close()

    def _show(self, recorder: Recorder) -> None:
        self._bar.update(recorder.num_finished - self._bar.n)
        if recorder.wall_time > 0:
            rate = recorder.num_output_tokens / recorder.wall_time
            self._bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)


class HttpProgress:
    """A progress bar over answered requests."""

    def __init__(self, name: str, num_requests: int, enabled: bool) -> None:
        self._bar = tqdm(
            total=num_requests, desc=name, unit="req", file=sys.stderr, disable=not enabled, dynamic_ncols=True
        )

    def __call__(self, num_ended: int) -> None:
        """Show how many requests have ended; the last one closes the bar."""
        self._bar.update(num_ended - self._bar.n)
        if num_ended == self._bar.total:
            self._bar.close()


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON can carry."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_result(result: dict[str, Any]) -> None:
    """Print `result` as one line of JSON: the last line of stdout."""
    print(json.dumps(_finite(result), default=str), flush=True)
