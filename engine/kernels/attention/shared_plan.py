"""How what a step's decode rows read (`kvarena.engine.sharing.reads`) comes to the kernel, in a buffer of fixed size.

    buffer (int32)   | items: how many | places [R] | cells [R] | parts [R] | items [5 a piece] ...            |
                                                                              only those of the step are sent

The kernel takes as many items as the first word says, so a captured graph replays any plan. No plan has more items than
rows have parts, so what bounds it is the room for the parts' sums: a step that needs more runs on the plain kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import SharedConfig
from kvarena.engine.kernels.attention.shared_decode import SharedScratch, shared_decode_attention
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.sampling.transfer import copy_to, to_device
from kvarena.engine.sharing.reads import RULES, SharedReads

ITEM_FIELDS = 5
_HEAD = 4  # words, so that what follows is aligned
MOST_SUMS = 2**27  # bytes of parts' sums at once: 8,192 parts of 32 heads of 128


@dataclass(slots=True)
class SharedPlan:
    """A step's items on the device.

    Attributes:
        buffer: all of it, int32.
        num_rows: for how many rows there is room.
        scratch: for the kernel; a captured graph uses it for as long as the plan lives.
    """

    buffer: Tensor
    num_rows: int
    scratch: SharedScratch


class SharedDecode:
    """Plans and launches attention of decode rows with common blocks, over one pool.

    Args:
        pool: where keys and values live.
        num_heads: query heads of a layer.
        config: how the kernel runs.
        num_multiprocessors: of the device.
        most_sums: bytes of parts' sums at most.
    """

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        config: SharedConfig,
        num_multiprocessors: int,
        most_sums: int = MOST_SUMS,
    ) -> None:
        self.config = config
        self._pool, self._num_heads = pool, num_heads
        self._num_programs = config.programs_per_sm * num_multiprocessors
        self._most_cells = most_sums // (4 * num_heads * pool.head_dim)
        self._scratch: SharedScratch | None = None
        self._order: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def most_rows(self) -> int:
        """Rows of an item at most."""
        return self.config.most_rows(self._num_heads // self._pool.num_kv_heads)

    def fits(self, reads: SharedReads) -> bool:
        """Whether there is room for the sums of a step's parts."""
        return int(reads.parts.sum()) <= self._most_cells

    def reserve(self, num_rows: int) -> SharedPlan:
        """A plan of fixed address for any step of at most so many rows that fits."""
        most_items = min(num_rows * RULES.most_parts, self._most_cells)
        size = _HEAD + 3 * num_rows + ITEM_FIELDS * most_items
        buffer = torch.zeros(size, dtype=torch.int32, device=self._pool.device)
        return SharedPlan(buffer, num_rows, self._scratch_for(num_rows))

    def plan(self, reads: SharedReads, num_rows: int) -> SharedPlan:
        """A step's plan in a buffer of its own; `num_rows` of the step, or more."""
        sent = to_device(self.words(reads, len(reads.order)), self._pool.device)
        return SharedPlan(sent, len(reads.order), self._scratch_for(num_rows))

    def fill(self, plan: SharedPlan, reads: SharedReads) -> None:
        """Send a step's items to a reserved plan's address."""
        words = self.words(reads, plan.num_rows)
        copy_to(words, plan.buffer[: len(words)])

    def __call__(self, call: AttentionCall, plan: SharedPlan) -> None:
        """Attention of the plan's rows in one layer."""
        head, places, cells, parts, items = plan.buffer.split(
            [_HEAD, *[plan.num_rows] * 3, len(plan.buffer) - _HEAD - 3 * plan.num_rows]
        )
        shared_decode_attention(
            call, head=head, places=places, cells=cells, parts=parts, items=items.view(-1, ITEM_FIELDS),
            scratch=plan.scratch, config=self.config, num_programs=self._num_programs,
        )  # fmt: skip

    def words(self, reads: SharedReads, num_rows: int) -> np.ndarray:
        """The buffer's content, int32, up to the last item."""
        count, num_items = len(reads.order), len(reads.first)
        begin = _HEAD + 3 * num_rows
        words = np.zeros(begin + ITEM_FIELDS * num_items, dtype=np.int32)
        words[0] = num_items
        rows = words[_HEAD:begin].reshape(3, num_rows)
        rows[0, :count] = reads.order
        rows[1, 1:count] = np.cumsum(reads.parts[:-1])
        rows[2, :count] = reads.parts
        # Steps in which nothing but ends moves have the same arrays.
        if self._order is None or self._order[0] is not reads.first:
            order = queue_order(reads, self.config.lag)
            fixed = np.stack([reads.first, reads.num_rows, reads.begin, reads.begin, reads.part], axis=1)[order]
            self._order = reads.first, order, fixed.astype(np.int32)
        _, order, fixed = self._order
        items = words[begin:].reshape(num_items, ITEM_FIELDS)
        items[:] = fixed
        items[:, 3] = reads.end[order]
        return words

    def _scratch_for(self, num_rows: int) -> SharedScratch:
        """Scratch with room for any plan of so many rows; plans share it, because launches follow each other."""
        cells, old = min(num_rows * RULES.most_parts, self._most_cells), self._scratch
        if old is None or cells > old.num_items or num_rows > old.num_rows:
            pool = self._pool
            old = self._scratch = SharedScratch(
                cells, num_rows, self._num_heads, pool.num_kv_heads, pool.head_dim, pool.device
            )
        return old


def queue_order(reads: SharedReads, lag: float) -> np.ndarray:
    """The items in the order in which programs take them, int64 [items].

    Those of several rows as they are, part by part, so that the programs that read the same keys do so at about the
    same time; those of single rows among them, the longest first, from where `lag` of the former have come: products
    and reads are then side by side, and a row's last part, which is its own, tends to end last and merges.
    """
    many, alone = np.flatnonzero(reads.num_rows > 1), np.flatnonzero(reads.num_rows == 1)
    alone = alone[np.argsort(reads.begin[alone] - reads.end[alone], kind="stable")]
    shares = []
    for items, first in ((many, 0.0), (alone, lag)):
        tokens = np.cumsum(reads.end[items] - reads.begin[items])
        shares.append(first + (1 - first) * tokens / max(int(tokens[-1]) if len(tokens) else 1, 1))
    return np.concatenate([many, alone])[np.argsort(np.concatenate(shares), kind="stable")]
