"""What decodes read once, by the block tables of whoever has no rows of its own: the simulator, the oracle.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.runner.block_tables import BlockTables
from kvarena.engine.sharing.reads import RULES, ReadRules, SharedReads
from kvarena.engine.sharing.step_reads import StepReads

_FIRST_ROWS = 64


class RequestReads:
    """Plans the shared reads of steps as a runner does, and gives each request a row.

    Args:
        most_rows: of an item; None: any number.
        rules: how to cut.
    """

    def __init__(self, most_rows: int | None = None, rules: ReadRules = RULES) -> None:
        self._rows: dict[str, int] = {}
        self._free = list(range(_FIRST_ROWS - 1, -1, -1))
        self._tables = BlockTables(_FIRST_ROWS)
        self._changes = self._tables.note_changes()
        self._most_rows, self._rules = most_rows, rules
        self._reads: StepReads | None = None

    def of_plan(self, plan: StepPlan, allocator: KVAllocator) -> int:
        """Tokens of KV that the decodes of `plan` need not read, because another one does."""
        decodes = [(req, start) for req, start, num_new in plan.scheduled if num_new == 1]
        tables = [allocator.block_table(req) for req, _ in decodes]
        reads = self([req.request_id for req, _ in decodes], tables, [start + 1 for _, start in decodes],
                     allocator.block_size)  # fmt: skip
        return 0 if reads is None else reads.num_saved

    def __call__(
        self, request_ids: Sequence[str], tables: Sequence[Sequence[int]], seq_lens: Sequence[int], block_size: int
    ) -> SharedReads | None:
        """The reads of decodes with such tables and context lengths; places are those in these lists.

        Args:
            request_ids, tables, seq_lens: of each decode.
            block_size: slots per block, always the same.
        """
        if self._reads is None:
            self._reads = StepReads(self._tables.read, self._changes, block_size, self._most_rows, self._rules)
        rows = [self._row(request_id) for request_id in request_ids]
        for row, table in zip(rows, tables, strict=True):
            self._tables.update(row, table)
        return self._reads(np.array(rows, dtype=np.int64), np.array(seq_lens, dtype=np.int64))

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended; others are fine."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._tables.forget(row)
                self._free.append(row)

    def _row(self, request_id: str) -> int:
        if request_id not in self._rows:
            if not self._free:
                count = len(self._tables.read)
                self._tables.add_rows(count)
                self._free = list(range(2 * count - 1, count - 1, -1))
            self._rows[request_id] = self._free.pop()
        return self._rows[request_id]
