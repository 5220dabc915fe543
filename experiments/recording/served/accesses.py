"""What a server's prefix cache is asked for: noted in the engine's process, named and replayed in the writer's.

allocator --> Accesses --RawEvents in frames--> Window --hashes of blocks--> MIN's hits, reuse distances
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvarena.engine.request import Request
from kvarena.experiments.caching.accesses import AccessLog, RawEvent, Reuse, named_events, with_loaded
from kvarena.experiments.caching.optimum import Room, optimal_hits
from kvarena.experiments.caching.reuse import reuse_stretches

EVENT_BYTES = 150  # of an event, as it is held


class Accesses:
    """The observer of a server's allocator: a log that may fail, and says what it costs.

    Args:
        log: is told.
        fail: told what went wrong; nothing is kept after that.

    Attributes:
        seconds: that the log has taken.
    """

    def __init__(self, log: AccessLog, fail: Callable[[Exception], None]) -> None:
        self._log: AccessLog | None = log
        self._fail = fail
        self.seconds = 0.0

    def take(self) -> list[RawEvent]:
        """The events since the last call."""
        return [] if self._log is None else self._log.take()

    def stop(self) -> None:
        """Keep nothing any more."""
        self._log = None

    def _end(self, error: Exception) -> None:
        self.stop()
        self._fail(error)

    # What the allocator tells.

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """See CacheObserver."""
        start = time.perf_counter()
        try:
            if self._log is not None:
                self._log.found(req, blocks)
        except Exception as error:
            self._end(error)
        self.seconds += time.perf_counter() - start

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """See CacheObserver."""
        begin = time.perf_counter()
        try:
            if self._log is not None:
                self._log.stored(req, table, start, cached)
        except Exception as error:
            self._end(error)
        self.seconds += time.perf_counter() - begin

    def removed(self, blocks: Sequence[int]) -> None:
        """See CacheObserver."""
        start = time.perf_counter()
        try:
            if self._log is not None:
                self._log.removed(blocks)
        except Exception as error:
            self._end(error)
        self.seconds += time.perf_counter() - start

    def left(self, req: Request) -> None:
        """See CacheObserver."""
        start = time.perf_counter()
        try:
            if self._log is not None:
                self._log.left(req)
        except Exception as error:
            self._end(error)
        self.seconds += time.perf_counter() - start

    def lowered(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """What a level below has is in what its requests say of themselves."""

    def forgotten(self, places: Sequence[int]) -> None:
        """As `lowered`."""


def served_reuse(
    raw: Sequence[RawEvent], hashes: Mapping[int, np.ndarray], prompt_lens: Mapping[int, int], ids: Mapping[int, str],
    loaded: Mapping[int, int], block_size: int, num_blocks: int,
) -> Reuse:  # fmt: skip
    """What the accesses of a recording come to.

    Args:
        raw: all events from an empty cache on.
        hashes: by row, of the blocks of its prompt and output.
        prompt_lens: by row, in tokens.
        ids: by row, the request's.
        loaded: by row, tokens that came up from levels below the pool.
        block_size: tokens of a block.
        num_blocks: of the pool and those levels.
    """
    numbers: dict[int, int] = {}
    rows = {row: place for place, row in enumerate(ids)}

    def extend(row: int, chain: list[int], stop: int) -> list[int]:
        chain += [numbers.setdefault(name, len(numbers)) for name in hashes[row][len(chain) : stop].tolist()]
        return chain

    most = {row: (length - 1) // block_size for row, length in prompt_lens.items()}
    num_loaded = {row: num_tokens // block_size for row, num_tokens in loaded.items()}
    named = named_events(with_loaded(raw, num_loaded), extend, most)
    events = [one if isinstance(one, Room) else one._replace(row=rows[one.row]) for one in named]
    hits = optimal_hits(events, num_blocks, len(numbers), len(rows))
    stretches = reuse_stretches(events, hits, len(numbers))
    return Reuse(block_size, list(ids.values()), hits * block_size, stretches)
