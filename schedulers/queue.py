"""The waiting queue: a heap with O(log n) push and pop and O(1) removal from the middle."""

from __future__ import annotations

import heapq
from typing import Any

from kvarena.engine.request import Request


class RequestQueue:
    """Requests by ascending key. A key is fixed when its request is pushed.

    A removed request's entry stays in the heap until it surfaces: `_entries` knows which entry of a request counts.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Request]] = []
        self._entries: dict[Request, tuple[Any, int, Request]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, req: Request) -> bool:
        return req in self._entries

    def push(self, req: Request, key: Any) -> None:
        """Queue `req` under `key`; equal keys come out in the order of their pushes."""
        entry = (key, self._num_pushed, req)
        self._num_pushed += 1
        self._entries[req] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request | None:
        """The request with the smallest key, or None."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(heap)
        return None

    def remove(self, req: Request) -> None:
        """Take `req` out, wherever it is. Raises KeyError when it is not queued."""
        del self._entries[req]
