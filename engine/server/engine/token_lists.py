"""Tokens that a request allows alone, and sequences that it bars: a constraint that needs no grammar."""

from __future__ import annotations

import numpy as np


class TokenLists:
    """A `TokenConstraint` of one choice.

    Args:
        allowed: the only tokens that may come; empty: any.
        barred: sequences that may not come: the last token of one is barred behind the others.
    """

    failure = ""
    is_free = False

    def __init__(self, allowed: tuple[int, ...], barred: tuple[tuple[int, ...], ...]) -> None:
        self.num_late = 0
        self._barred = [(list(ids[:-1]), ids[-1]) for ids in barred]
        self._most = max((len(head) for head, _ in self._barred), default=0)
        self._last: list[int] = []
        self._allowed = np.array(allowed, dtype=np.int64)

    def fill(self, bitmask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next."""
        bits = bitmask.view(np.uint32)
        bits[:] = 0 if self._allowed.size else 0xFFFFFFFF
        np.bitwise_or.at(bits, self._allowed // 32, np.uint32(1) << (self._allowed % 32).astype(np.uint32))
        for head, token in self._barred:
            if not head or self._last[-len(head) :] == head:
                bits[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (token % 32)))

    def accept(self, token_id: int) -> None:
        """Move on by one token."""
        self._last = [*self._last, token_id][-self._most :] if self._most else []
