"""From a step's rows to what they read, by the block tables of those who run it. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.sharing.prefix_order import PrefixOrder
from kvarena.engine.sharing.reads import RULES, ReadPlanner, ReadRules, SharedReads


class StepReads:
    """Plans the reads of steps.

    Args:
        tables, changes: see `PrefixOrder`.
        block_size, most_rows, rules: see `ReadPlanner`.
        fits: whether there is room for a plan; None: always.

    Attributes:
        num_saved: tokens of KV that the last step need not read, because another of its rows reads them.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        changes: dict[int, int],
        block_size: int,
        most_rows: int | None = None,
        rules: ReadRules = RULES,
        fits: Callable[[SharedReads], bool] | None = None,
    ) -> None:
        self._order = PrefixOrder(tables, changes)
        self._plan = ReadPlanner(block_size, most_rows, rules)
        self._fits = fits
        self.num_saved = 0

    def __call__(
        self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64], decodes: NDArray[np.int64] | None = None
    ) -> SharedReads | None:
        """What a step reads; None where each row is better left to itself.

        Args:
            rows: int64 [n], the rows of `tables`; those of padding have none.
            seq_lens: int64 [n], context lengths.
            decodes: int64, the places of those that compute one token, of which alone this is; None: all do.
        """
        self.num_saved = 0
        if decodes is not None:
            rows, seq_lens = rows[decodes], seq_lens[decodes]
        reads = self._plan(self._order.of(rows), seq_lens)
        if reads is None or not (self._fits is None or self._fits(reads)):
            return None
        self.num_saved = reads.num_saved
        return reads if decodes is None else reads._replace(order=decodes[reads.order])
