"""Where a context's blocks are: through the block table, or counted from the start of its region."""

from __future__ import annotations

import numpy as np

from kvarena.engine.contract import NULL_BLOCK


def block_ids(
    block_table: np.ndarray, rows: np.ndarray, block_index: np.ndarray, end_block: np.ndarray, *, contiguous: bool
) -> np.ndarray:
    """Ids of blocks of contexts, the null block where a context has ended.

    Args:
        block_table: int [B, width].
        rows: int [n], the row of the table that each line of `block_index` reads.
        block_index: int [n, m], blocks counted from the start of the context.
        end_block: int [n], blocks of the context.
        contiguous: a context lies in consecutive blocks: only the table's first column is read.

    Returns:
        int64 [n, m].
    """
    if contiguous:
        blocks = block_table[rows, 0].astype(np.int64)[:, None] + block_index
    else:
        blocks = block_table[rows[:, None], np.minimum(block_index, block_table.shape[1] - 1)].astype(np.int64)
    blocks[block_index >= end_block[:, None]] = NULL_BLOCK
    return blocks
