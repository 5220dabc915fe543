"""What requests asked of a prefix cache, in order: kept while they run, and named when they are done.

    allocator --found, stored, removed, left--> AccessLog --after the run--> MIN's hits, request by request;
                                                                             how long ago what was asked for was held

While requests run only references and counts are kept; the names of blocks (chains of hashes) are made afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.contract import CacheObserver, KVAllocator
from kvarena.engine.request import Request
from kvarena.experiments.caching.optimum import Ask, Event, Grow, Keys, Leave, Room, optimal_hits
from kvarena.experiments.caching.reuse import reuse_stretches


class _Text(NamedTuple):
    """What stands in a request's slots; its output grows on."""

    salt: str
    prompt: list[int]
    output: list[int]


class Reuse(NamedTuple):
    """What came of what was asked for.

    Attributes:
        block_size: tokens of a block.
        request_ids: of the requests that came, by row.
        optimal_tokens: prompt tokens that MIN finds in this order of accesses, by row.
        stretches: of what they asked for, as `reuse_stretches` gives them.
    """

    block_size: int
    request_ids: list[str]
    optimal_tokens: NDArray[np.int64]
    stretches: dict[str, NDArray[np.int64] | NDArray[np.float64]]


class AccessLog:
    """The observer of a prefix cache, whose answers it does not change.

    Args:
        allocator: has a prefix cache.
        now: the time, in seconds; while requests do not count it is not asked, and taken to be 0.
        also: is told as well.

    Attributes:
        counts: whether the requests that come count; those before, of a cache that is filled, do not.
    """

    def __init__(
        self, allocator: PrefixCachingAllocator, now: Callable[[], float], also: CacheObserver | None = None
    ) -> None:
        self._allocator, self._now, self._also = allocator, now, also
        self.counts = True
        self._events: list[tuple[Any, ...]] = []
        self._rows: dict[Request, int] = {}
        self._requests: list[Request] = []
        self._texts: list[_Text] = []
        self._evicted: int | None = None  # entries of tables at an eviction that is not noted yet
        self._counted: set[int] = set()  # rows whose first admission there was
        self._live: dict[Request, int] = {}  # blocks that are known of it

    # ---- what the allocator tells

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """`req` is admitted; its first admission is the one that counts, and of a sample that shares none does."""
        row = self._row(req)
        counts = self.counts and row not in self._counted and not req.num_computed_tokens and not req.num_preemptions
        if counts:
            self._counted.add(row)
        # All of its prompt's full blocks, and those of its output that were found again.
        self._live[req] = known = max(req.num_prompt_tokens // self._allocator.block_size, len(blocks))
        self._events.append((Ask, row, known, counts, len(blocks), self._time()))
        self._flush()
        if self._also is not None:
            self._also.found(req, blocks)

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """Blocks of `req` are full: those of its prompt were known."""
        self._flush()
        stop, known = start + len(cached), self._live.get(req, 0)
        if stop > known:
            self._events.append((Grow, self._row(req), known, stop))
            self._live[req] = stop
            self._events.append((Room, self._entries()))
        if self._also is not None:
            self._also.stored(req, table, start, cached)

    def removed(self, blocks: Sequence[int]) -> None:
        """Room was needed, so nothing is free: what is not cached any more is owned, or will be at once."""
        self._flush()
        self._evicted = self._entries(free=0)
        if self._also is not None:
            self._also.removed(blocks)

    def left(self, req: Request) -> None:
        """`req` owns nothing any more."""
        self._flush()
        if self._live.pop(req, None) is not None:
            self._events.append((Leave, self._rows[req], self._time()))
        if self._also is not None:
            self._also.left(req)

    def _time(self) -> float:
        return self._now() if self.counts else 0.0

    def _flush(self) -> None:
        """Note an eviction, behind the request that it made room for: a fork evicts before it is told of."""
        if self._evicted is not None:
            self._events.append((Room, self._evicted))
            self._evicted = None

    def _entries(self, free: int | None = None) -> int:
        """How many entries the tables have, or will have when `free` blocks are left."""
        allocator = self._allocator
        idle = allocator.num_free_blocks if free is None else free + allocator.num_cached_blocks
        return allocator.num_blocks - idle + allocator.num_shared_entries

    def _row(self, req: Request) -> int:
        row = self._rows.get(req)
        if row is None:
            row = self._rows[req] = len(self._requests)
            self._requests.append(req)
            self._texts.append(_Text(req.cache_salt, req.prompt_identities, req.output_token_ids))
        return row

    # ---- after the run

    def reuse(self) -> Reuse:
        """What the accesses so far come to."""
        events, num_keys = self._named()
        size, ids = self._allocator.block_size, [req.request_id for req in self._requests]
        hits = optimal_hits(events, self._allocator.num_blocks, num_keys, len(ids))
        return Reuse(size, ids, hits * size, reuse_stretches(events, hits, num_keys))

    def _named(self) -> tuple[list[Event], int]:
        """The events with the blocks' numbers, and how many numbers there are."""
        self._flush()
        namer = _Namer(self._allocator.block_size)
        chains: dict[int, list[int]] = {}
        events: list[Event] = []
        size = self._allocator.block_size
        for kind, *what in self._events:
            if kind is Room:
                events.append(Room(what[0]))
                continue
            row, text = what[0], self._texts[what[0]]
            if kind is Leave:
                events.append(Leave(row, what[1]))
                chains.pop(row, None)
            elif kind is Ask:
                _, known, counts, num_found, time = what
                chains[row] = chain = namer.extend([], text, known)
                wanted = (len(text.prompt) - 1) // size if counts else 0
                events.append(Ask(row, _keys(chain), min(wanted, len(chain)), num_found, time))
            else:
                chain = namer.extend(chains.setdefault(row, []), text, what[2])
                events.append(Grow(row, _keys(chain[what[1] :])))
        return events, namer.num_keys


def _keys(chain: list[int]) -> Keys:
    return np.array(chain, dtype=np.int64)


class _Namer:
    """Numbers for blocks: equal ones for equal tokens behind equal prefixes."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._numbers: dict[tuple[Any, ...], int] = {}

    @property
    def num_keys(self) -> int:
        """Numbers are below this one."""
        return len(self._numbers)

    def extend(self, chain: list[int], text: _Text, stop: int) -> list[int]:
        """Name the blocks of `text` from the end of `chain` up to `stop`."""
        size, numbers, prompt = self._size, self._numbers, text.prompt
        before: int | str = chain[-1] if chain else text.salt
        for start in range(len(chain) * size, stop * size, size):
            end = start + size
            if end <= len(prompt):
                tokens = prompt[start:end]
            else:
                at = max(0, start - len(prompt))
                tokens = prompt[start:] + text.output[at : end - len(prompt)]
            before = numbers.setdefault((before, *tokens), len(numbers))
            chain.append(before)
        return chain


def watch(allocator: KVAllocator, now: Callable[[], float]) -> AccessLog | None:
    """Keep from now on what is asked of `allocator`; None without a prefix cache, or of one that is not empty.

    What it holds by then nobody asked for, so that no bound would be one.

    Args:
        allocator: of an engine.
        now: see AccessLog.
    """
    if not isinstance(allocator, PrefixCachingAllocator):
        return None
    if allocator.num_free_blocks - allocator.num_cached_blocks < allocator.num_blocks:
        return None
    log = AccessLog(allocator, now, None if isinstance(allocator.observer, AccessLog) else allocator.observer)
    allocator.observer = log
    return log
