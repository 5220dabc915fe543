"""What the decode rows of a step read, each shared part once.

    part           0        1        2    3      a row is cut at whole multiples of a number that follows from its own
    row 4   | ====== | ====== | ------ | - |     length alone: whoever shares its parts, they begin and end alike
    row 0   | ====== | ====== | ---- |
    row 2   | ====== | ------ | ------ |         = read once for all rows that have it in common    - read by one row

The sums of a row's parts are merged in the order of the parts. A shared part ends with the last whole part that lies
within the common blocks; what is left of these, less than a part, each row reads for itself. Free of torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.sharing.prefix_order import CommonPrefixes

IntArray = NDArray[np.int64]


class ReadRules(NamedTuple):
    """How contexts are cut, and what is worth it.

    A row's parts leave sums in memory (of 8 KV heads of 128, as much as 4 tokens of their KV) which the merge reads:
    few parts. What is less than a part is read by each row: small parts. Up to 16 parts of at least 256 tokens leave
    each row at most 255 common tokens to read for itself, of contexts above 4,096 less than an eighth; as a mean half.

    Attributes:
        least_part: tokens of the smallest part; a power of two.
        most_parts: of a row; a part is the smallest power of two with which there are no more.
        least_saved: part of all tokens read that must be saved, or else nothing is shared: the kernel that shares is
            not the one that is fastest where nothing is.
    """

    least_part: int = 256
    most_parts: int = 16
    least_saved: float = 0.1


RULES = ReadRules()


class SharedReads(NamedTuple):
    """Items of a step with n decode rows. Each is a part of one or more rows that follow each other in `order`.

    Attributes:
        order: int64 [n], the rows' places in the step.
        parts: int64 [n], parts of each row, in order.
        first, num_rows: int64 [items], where in `order` an item's rows begin, and how many they are.
        part: int64 [items], which part of theirs it is.
        size: int64 [items], tokens of a whole part of these rows.
        begin, end: int64 [items], its tokens: only a row's last part is less than whole.
        num_saved: tokens of KV that need not be read, because another row reads them.
    """

    order: IntArray
    parts: IntArray
    first: IntArray
    num_rows: IntArray
    part: IntArray
    size: IntArray
    begin: IntArray
    end: IntArray
    num_saved: int


def reads_alone(num_rows: int) -> SharedReads:
    """Items of so many rows with a context of one token each, which have nothing in common."""
    order, ones = np.arange(num_rows), np.ones(num_rows, dtype=np.int64)
    zeros = np.zeros_like(ones)
    return SharedReads(order, ones, order, ones, zeros, np.full(num_rows, RULES.least_part), zeros, ones, 0)


def part_tokens(seq_lens: IntArray, rules: ReadRules = RULES) -> IntArray:
    """Tokens of a part of contexts of such lengths, int64 [n]."""
    least = np.maximum(-(-seq_lens // rules.most_parts), rules.least_part)
    return np.int64(1) << np.ceil(np.log2(least)).astype(np.int64)


class ReadPlanner:
    """Cuts the contexts of steps' decode rows into items; most steps move the ends of their last parts alone.

    Args:
        block_size: slots per block.
        most_rows: of an item; None: any number.
        rules: how to cut.
    """

    def __init__(self, block_size: int, most_rows: int | None = None, rules: ReadRules = RULES) -> None:
        self._block_size = block_size
        self._most_rows = most_rows
        self._rules = rules
        self._last: tuple[CommonPrefixes, IntArray, IntArray, SharedReads | None] | None = None

    def __call__(self, prefixes: CommonPrefixes | None, seq_lens: IntArray) -> SharedReads | None:
        """The items of a step, those of early parts first; None where too little would be saved.

        Args:
            prefixes: of the step's decode rows; None: they have nothing in common.
            seq_lens: int64 [step's rows], context lengths by place in the step.
        """
        if prefixes is None:
            return None
        lens = seq_lens[prefixes.order]
        sizes = part_tokens(lens, self._rules)
        parts = -(-lens // sizes)
        last = self._last
        if (
            last is not None
            and last[0] is prefixes
            and np.array_equal(last[1], sizes)
            and np.array_equal(last[2], parts)
        ):
            reads = last[3]
            if reads is not None:
                # The order is by length of a part, which is the same.
                size = reads.size
                reads = reads._replace(end=np.minimum(reads.begin + size, seq_lens[reads.order][reads.first]))
            return reads
        reads = self._cut(prefixes, lens, sizes, parts)
        self._last = (prefixes, sizes, parts, reads)
        return reads

    def _cut(self, prefixes: CommonPrefixes, lens: IntArray, sizes: IntArray, parts: IntArray) -> SharedReads | None:
        order = prefixes.order
        # A part holds no token that a row computes in this step, which is behind what it has in common with others.
        common = np.minimum(prefixes.common * self._block_size, np.minimum(lens[:-1], lens[1:]))
        least = int(sizes.min())
        if least == int(sizes.max()):
            first, count, part = _runs(common // least, parts)
            size = np.full(len(part), least)
        else:
            # Rows whose parts are of different length have no part in common.
            place = np.argsort(sizes, kind="stable")
            order, lens, sizes, parts = order[place], lens[place], sizes[place], parts[place]
            between = np.zeros(len(place) - 1, dtype=np.int64)
            for begin, end in pairwise([0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(place)]):
                if end - begin > 1:
                    rows = place[begin:end]
                    between[begin : end - 1] = np.minimum.reduceat(common[: rows[-1]], rows[:-1])
            first, count, part = _runs(between // sizes[:-1], parts)
            size = sizes[first]
        num_saved = int(((count - 1) * size).sum())
        if not num_saved or num_saved < self._rules.least_saved * int(lens.sum()):
            return None
        if self._most_rows is not None and int(count.max()) > self._most_rows:
            first, count, part, size = _pieces(first, count, part, size, self._most_rows)
        begin = part * size
        return SharedReads(
            order, parts, first, count, part, size, begin, np.minimum(begin + size, lens[first]), num_saved
        )


def _runs(common: IntArray, parts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Rows that have a part in common: the first of each such run, how many it is, and the part; by part.

    Args:
        common: int64 [n - 1], whole parts in common with the next row.
        parts: int64 [n].
    """
    number = np.arange(int(parts.max()))[:, None]
    there = number < parts
    starts = there.copy()
    starts[:, 1:] &= number >= common
    cells = np.flatnonzero(there)
    at = np.flatnonzero(starts.ravel()[cells])
    part, first = np.divmod(cells[at], len(parts))
    return first, np.diff(at, append=len(cells)), part


def _pieces(first: IntArray, count: IntArray, part: IntArray, size: IntArray, most: int) -> tuple[IntArray, ...]:
    """The items with at most so many rows each, those of one cut evenly."""
    number = -(-count // most)
    index = np.repeat(np.arange(len(count)), number)
    piece = np.arange(len(index)) - (np.cumsum(number) - number)[index]
    begin, end = (((piece + i) * count[index]) // number[index] for i in (0, 1))
    return first[index] + begin, end - begin, part[index], size[index]
