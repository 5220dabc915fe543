"""The order in which a sweep runs its cells, so that a machine that drifts favours none of them."""

from __future__ import annotations


def order(num_cells: int, block: int) -> list[int]:
    """The order of the cells in one block: a round of one seed, in which every cell runs once.

    Williams' design (1949), a row and then its reverse. In each two blocks every pair of cells runs once in either
    order and at the same distance, so a linear drift cancels; and in `num_cells` blocks (twice as many if that is odd)
    every cell stands in every place, and behind every other one, equally often.

    Args:
        num_cells: cells of a block.
        block: number of the block since the sweep began, from 0; seeds are outermost, so it is
            index of the seed * rounds + round.

    Returns:
        The cells' indices in the order in which they run.
    """
    shift, is_mirrored = divmod(block, 2)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(num_cells)]  # 0, 1, -1, 2, -2, ...
    row = [(cell + shift) % num_cells for cell in zigzag]
    return row[::-1] if is_mirrored else row
