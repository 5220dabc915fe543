"""S3-FIFO (Yang et al., SOSP'23): a small queue in front, whose blocks must be used again to get into the main one."""

from __future__ import annotations

from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request

SMALL, MAIN = 0, 1
MOST_USES = 3


class S3FifoPolicy(EvictionPolicy):
    """Three first-in-first-out queues: small, main, and ghosts of what the small one lost.

    Args:
        small: share of the pool beyond which the small queue is the next to lose a block.
        sizes: see EvictionPolicy; at most as many ghosts as the pool has blocks (the paper's size).
    """

    recalls = True
    num_lanes = 2
    _clock = 0

    def __init__(self, *, small: float = 0.1, **sizes: Any) -> None:
        super().__init__(**sizes)
        if not 0 < small < 1:
            raise ConfigError(f"allocator.eviction_options.small={small} must be a share between 0 and 1")
        self._most_small = max(1, int(small * self.num_blocks))
        self._ghosts = Ghosts(min(self.max_ghosts, self.num_blocks))
        self._num_small = 0

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.uses = 0
        if self._ghosts.recall(entry.digest):
            entry.lane = MAIN
        else:
            self._num_small += 1
        self._turn(entry)

    def _turn(self, entry: Entry) -> None:
        self._clock += 1
        entry.last = self._clock

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.uses = min(MOST_USES, entry.uses + 1)

    def price(self, entry: Entry) -> float:
        return entry.last

    def next_lane(self) -> int:
        return SMALL if self._num_small > self._most_small else MAIN

    def spares(self, entry: Entry) -> bool:
        """One that was used in the small queue goes on to the main one; there each use is a round more."""
        if not entry.uses:
            return False
        if entry.lane == SMALL:
            self._num_small -= 1
            entry.lane, entry.uses = MAIN, 0
        else:
            entry.uses -= 1
        self._turn(entry)
        return True

    def evicted(self, entry: Entry) -> None:
        if entry.lane == SMALL:
            self._num_small -= 1
            self._ghosts.remember(entry.digest, 1)

    @property
    def num_remembered(self) -> int:
        return len(self._ghosts)

    @property
    def num_bytes(self) -> int:
        return self._ghosts.num_bytes
