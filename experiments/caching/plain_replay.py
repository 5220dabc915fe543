"""A prefix cache by itself: a trace in its order, nothing running, the real policies, and MIN beside them.

    for each request:   hits: leading blocks that are there      then all its blocks are published and given back,
                                                                 and what is too much evicted

No engine, no time, no locks from one request to the next: what a policy finds of a trace, in seconds of computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.allocators.eviction_order import Entry, EvictionOrder, EvictionPolicy
from kvarena.allocators.eviction_policies import make_policy
from kvarena.engine.request import Request
from kvarena.experiments.caching.optimum import Ask, Event, Leave, Room, optimal_hits

Trace = Sequence[Sequence[int]]  # of each request the keys of its blocks; a key stands for a block and all before it
_MASK = 2**61 - 1


def numbered(rows: Iterable[Iterable[Any]]) -> list[list[int]]:
    """Any keys as numbers from 0, in order of first use."""
    numbers: dict[Any, int] = {}
    return [[numbers.setdefault(key, len(numbers)) for key in row] for row in rows]


def num_distinct(trace: Trace) -> int:
    """Different blocks of a numbered trace."""
    return 1 + max(chain.from_iterable(trace), default=-1)


def replay_policy(
    trace: Trace, num_blocks: int, policy: str, *, ghosts: float = 8, block_size: int = 1,
    options: Mapping[str, Any] | None = None, times: Sequence[float] | None = None,
    kinds: Sequence[str] | None = None,
) -> tuple[NDArray[np.int64], EvictionPolicy]:  # fmt: skip
    """Blocks that a policy finds for each request, and the policy as it ended.

    Args:
        trace: numbered.
        num_blocks: of the cache.
        policy: its name.
        ghosts, options: see `make_policy`.
        block_size: tokens of a block, for policies that weigh what a block costs.
        times: when each request comes, in seconds; None: one a second.
        kinds: which kind of request each one is; None: no one says.
    """
    made = make_policy(policy, num_blocks=num_blocks, block_size=block_size, ghosts=ghosts, options=options or {})
    if made.needs_future:
        made.foresee([(str(row), [_digest(key) for key in keys]) for row, keys in enumerate(trace)])
    order = EvictionOrder(made)
    entries: dict[int, Entry] = {}
    found = np.zeros(len(trace), dtype=np.int64)
    for row, keys in enumerate(trace):
        req = Request(
            str(row), [0], arrival_time=row if times is None else times[row], kind="" if kinds is None else kinds[row]
        )
        path = _found(keys, entries)
        found[row] = len(path)
        for entry in path:
            order.take(entry)
        order.hit(path, req)
        for key in keys[len(path) :]:
            entry = entries[key] = Entry(path[-1] if path else None, key + 1, _digest(key))
            path.append(entry)
            if order.inserted is not None:
                order.inserted(entry, req)
        for entry in reversed(path):
            order.release(entry)
        if order.num_evictable > num_blocks:
            for entry in order.evict(order.num_evictable - num_blocks):
                del entries[entry.block - 1]
    return found, made


def _found(keys: Sequence[int], entries: dict[int, Entry]) -> list[Entry]:
    path = []
    for key in keys:
        entry = entries.get(key)
        if entry is None:
            break
        path.append(entry)
    return path


def _digest(key: int) -> int:
    """A number of 61 bits that looks drawn: policies sample blocks by it."""
    return hash((key, _MASK))


def replay_min(trace: Trace, num_blocks: int) -> NDArray[np.int64]:
    """Blocks that MIN finds for each request: no policy finds more in all."""
    events: list[Event] = []
    for row, keys in enumerate(trace):
        events += (Ask(row, np.array(keys, dtype=np.int64), len(keys)), Leave(row), Room(0))
    return optimal_hits(events, num_blocks, num_distinct(trace), len(trace))


def endless_hits(trace: Trace) -> NDArray[np.int64]:
    """Blocks that a cache without end finds for each request."""
    return replay_min(trace, num_distinct(trace))
