"""Judges what a step's decodes would read once for several of them: no row may read a block that is not its own.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvarena.engine.contract import cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.sharing.reads import ReadRules, SharedReads
from kvarena.experiments.simulation.request_reads import RequestReads

# Parts as small as the traces are short, and whatever is common is shared.
_RULES = ReadRules(least_part=2, most_parts=8, least_saved=0.0)


class ReadFault(EngineError):
    """A row would read what is not in its block table, or not all of it once."""


class ReadJudge:
    """Plans the shared reads of each step as a runner does, and checks them against the block tables.

    Args:
        block_size: slots per block.
        most_rows: of an item; small, so that items are cut.

    Attributes:
        num_saved: tokens that need not have been read so far.
    """

    def __init__(self, block_size: int, most_rows: int = 3) -> None:
        self._block_size = block_size
        self._reads = RequestReads(most_rows, _RULES)
        self.num_saved = 0

    def check(self, request_ids: Sequence[str], tables: Sequence[Sequence[int]], seq_lens: Sequence[int]) -> None:
        """Judge a step of such decodes.

        Raises:
            ReadFault: a row would read another's block, or a token of its context not once.
        """
        reads = self._reads(request_ids, tables, seq_lens, self._block_size)
        if reads is not None:
            self.num_saved += reads.num_saved
            self._check(reads, request_ids, tables, seq_lens)

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended."""
        self._reads.release(request_ids)

    def _check(
        self,
        reads: SharedReads,
        request_ids: Sequence[str],
        tables: Sequence[Sequence[int]],
        seq_lens: Sequence[int],
    ) -> None:
        spans: list[list[tuple[int, int]]] = [[] for _ in request_ids]
        columns = (reads.first, reads.num_rows, reads.begin, reads.end)
        for first, count, begin, end in zip(*(column.tolist() for column in columns), strict=True):
            places = reads.order[first : first + count].tolist()
            blocks = slice(begin // self._block_size, cdiv(end, self._block_size))
            read = tables[places[0]][blocks]
            for place in places:
                if list(tables[place][blocks]) != list(read):
                    raise ReadFault(
                        f"request {request_ids[place]!r} would read positions [{begin}, {end}) in blocks "
                        f"{list(read)} of request {request_ids[places[0]]!r}, and its own are "
                        f"{list(tables[place][blocks])}"
                    )
                spans[place].append((begin, end))
        for request_id, found, seq_len in zip(request_ids, spans, seq_lens, strict=True):
            bounds = [0, *(end for _, end in sorted(found))]
            if [begin for begin, _ in sorted(found)] != bounds[:-1] or bounds[-1] != seq_len:
                raise ReadFault(f"request {request_id!r} would read {sorted(found)} of {seq_len} positions")
            assert all(a < b for a, b in pairwise(bounds))
