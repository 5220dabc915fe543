"""A slow link for the oracle: copies of a transfer are made when it arrives; nobody may look before. Free of torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from kvarena.engine.clock import Clock
from kvarena.engine.contract import BlockCopy, CopyKind, Transfer


class Begun(NamedTuple):
    """A copy under way; `staged`: what was read from the pool when it began, of one that goes down."""

    copy: BlockCopy
    transfer: Transfer
    staged: list[int | None]


class SlowLink:
    """Each transfer takes a random time, and those of one direction arrive in their order.

    Args:
        clock: the engine's.
        most_delay: seconds that a transfer takes at most.
        seed: of the delays.
    """

    def __init__(self, clock: Clock, most_delay: int, seed: int) -> None:
        self._clock, self._most_delay = clock, most_delay
        self._rng = random.Random(f"link {seed}")
        self._last = dict.fromkeys(CopyKind, 0.0)
        self._begun: list[Begun] = []

    def begin(self, copy: BlockCopy, transfer: Transfer, staged: list[int | None]) -> None:
        """A copy is under way."""
        self._begun.append(Begun(copy, transfer, staged))

    def launch(self, copies: Sequence[BlockCopy]) -> None:
        """The step that began them was launched: say when they arrive."""
        for kind, _, _, transfer in copies:
            if transfer is not None and transfer.arrival is None:
                arrival = self._clock.now() + self._rng.randint(0, self._most_delay)
                transfer.arrival = self._last[kind] = max(self._last[kind], arrival)

    def due(self) -> list[Begun]:
        """Copies that have arrived, in order of arrival. Those of a step that failed never do."""
        now = self._clock.now()
        known = [(one.transfer.arrival, i) for i, one in enumerate(self._begun) if one.transfer.arrival is not None]
        landed = [self._begun[i] for arrival, i in sorted(known) if arrival <= now]
        self._begun = [self._begun[i] for arrival, i in known if arrival > now]
        return landed
