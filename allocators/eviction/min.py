"""Belady's MIN (1966), online: the block that is asked for last goes first, for a workload that is known beforehand."""

from __future__ import annotations

from sys import getsizeof
from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.engine.request import Request

NEVER = float("inf")


class MinPolicy(EvictionPolicy):
    """Knows all prompts that will come, and goes by which of them asks for a block next.

    Requests that overtake each other are no trouble: the next one that asks is the first in the list that has not
    begun. A block that nobody asks for is refused a place.
    """

    recalls = True
    needs_future = True

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._askers: dict[int, list[int]] = {}  # digest -> numbers of requests that ask for it, the last one first
        self._numbers: dict[str, int] = {}
        self._begun = bytearray()

    def foresee(self, prompts: list[tuple[str, list[int]]]) -> None:
        self._numbers = {request_id: number for number, (request_id, _) in enumerate(prompts)}
        self._begun = bytearray(len(prompts))
        self._askers = {}
        for number in range(len(prompts) - 1, -1, -1):
            for digest in prompts[number][1]:
                self._askers.setdefault(digest, []).append(number)

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        self._begin(req)

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        self._begin(req)

    def _begin(self, req: Request) -> None:
        number = self._numbers.get(req.request_id)
        if number is not None:
            self._begun[number] = 1

    def _next(self, entry: Entry) -> float:
        """The number of the next request that asks for the block."""
        askers = self._askers.get(entry.digest, [])
        while askers and self._begun[askers[-1]]:
            askers.pop()
        return askers[-1] if askers else NEVER

    def price(self, entry: Entry) -> float:
        return -self._next(entry)

    def admits(self, entry: Entry) -> bool:
        return self._next(entry) < NEVER

    @property
    def num_remembered(self) -> int:
        return len(self._askers)

    @property
    def num_bytes(self) -> int:
        lists = sum(map(getsizeof, self._askers.values()))
        return getsizeof(self._askers) + lists + getsizeof(self._begun) + getsizeof(self._numbers)
