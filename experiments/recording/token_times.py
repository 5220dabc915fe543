"""When each output token came: noted step by step at the cost of one entry, and spread over the requests after the run.

during the run    rows 0 1 2 | steps ending at 1.0, 1.5, 2.0        rows 0 2 | 2.5, 3.0
after it          0: 1.0 1.5 2.0 2.5 3.0      1: 1.0 1.5 2.0      2: 1.0 1.5 2.0 2.5 3.0
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np


class TokenTimes:
    """Which requests each step sampled for. Steps that follow each other with the same requests share one list."""

    def __init__(self) -> None:
        self._batches: list[tuple[array[int], array[float]]] = []
        self._last: array[int] | None = None

    def add(self, rows: array[int], when: float) -> None:
        """A step sampled for the requests `rows` (each once) at `when`. The caller never changes `rows` afterwards."""
        if rows is self._last:
            self._batches[-1][1].append(when)
        else:
            self._last = rows
            self._batches.append((rows, array("d", (when,))))

    def extend(self, rows: array[int], times: array[float]) -> None:
        """Steps that followed each other sampled for `rows`."""
        self._batches.append((rows, times))
        self._last = None

    def take(self) -> list[tuple[array[int], array[float]]]:
        """Rows and times since the last call, which are the caller's now."""
        batches, self._batches, self._last = self._batches, [], None
        return batches

    def lists(self, num_rows: int) -> Callable[[int], np.ndarray]:
        """What answers for each of `num_rows` requests when it was sampled for: float64, in seconds, in order."""
        counts = np.zeros(num_rows, dtype=np.int64)
        for rows, times in self._batches:
            counts[np.asarray(rows)] += len(times)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        values = np.empty(offsets[-1])
        filled = offsets[:-1].copy()
        for rows, times in self._batches:
            at = np.asarray(rows)
            values[filled[at][:, None] + np.arange(len(times))] = np.asarray(times)
            filled[at] += len(times)
        return lambda row: values[offsets[row] : offsets[row + 1]]
