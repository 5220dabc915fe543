"""The waiting queue: a heap with O(log n) push and pop and O(1) removal from the middle."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Any

from kvarena.engine.request import Request


class RequestQueue:
    """Requests by ascending key. A key is fixed when its request is pushed.

    A removed request's entry stays in the heap until it surfaces: `_entries` knows which entry of a request counts.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Request]] = []
        self._entries: dict[Request, tuple[Any, int, Request]] = {}
        self._pushes = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, req: Request) -> bool:
        return req in self._entries

    def push(self, req: Request, key: Any) -> None:
        """Queue `req` under `key`; equal keys come out in the order of their pushes."""
        self._entries[req] = entry = (key, next(self._pushes), req)
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request | None:
        """The request with the smallest key, or None."""
        while self._heap:
            entry = self._heap[0]
            if self._entries.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(self._heap)
        return None

    def remove(self, req: Request) -> None:
        """Take `req` out, wherever it is. Raises KeyError when it is not queued."""
        del self._entries[req]
