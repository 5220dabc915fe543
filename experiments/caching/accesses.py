"""What requests asked of a prefix cache, in order: kept while they run, and named when they are done.

    allocator --found, stored, removed, left--> AccessLog --after the run--> MIN's hits, request by request;
                                                                             how long ago what was asked for was held

While requests run only references and counts are kept; the names of blocks (chains of hashes) are made afterwards. A
server's log has no references: it hands its events on, and who has the tokens names the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.contract import CacheObserver, KVAllocator
from kvarena.engine.request import Request
from kvarena.experiments.caching.optimum import Ask, Event, Grow, Keys, Leave, Room, optimal_hits
from kvarena.experiments.caching.reuse import reuse_stretches

RawEvent = tuple[Any, ...]  # an Event's class, and its fields as far as they are known while requests run


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
        row_of: numbers of requests that somebody else keeps; None: all that come are kept here.

    Attributes:
        counts: whether the requests that come count; those before, of a cache that is filled, do not.
    """

    def __init__(
        self, allocator: PrefixCachingAllocator, now: Callable[[], float], also: CacheObserver | None = None,
        row_of: Callable[[Request], int] | None = None,
    ) -> None:  # fmt: skip
        self._allocator, self._now, self._also, self._row_of = allocator, now, also, row_of
        self.counts = True
        self._events: list[RawEvent] = []
        self._rows: dict[Request, int] = {}
        self._requests: list[Request] = []
        self._texts: list[_Text] = []
        self._evicted: int | None = None  # entries of tables at an eviction that is not noted yet
        self._live: dict[Request, tuple[int, int]] = {}  # its row, and blocks that are known of it

    # ---- what the allocator tells

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """`req` is admitted; its first admission is the one that counts, and of a sample that shares none does."""
        row = self._row(req)
        counts = self.counts and not req.num_computed_tokens and not req.num_preemptions
        # All of its prompt's full blocks, and those of its output that were found again.
        known = max(req.num_prompt_tokens // self._allocator.block_size, len(blocks))
        self._live[req] = row, known
        self._events.append((Ask, row, known, counts, len(blocks), self._time()))
        self._flush()
        if self._also is not None:
            self._also.found(req, blocks)

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """Blocks of `req` are full: those of its prompt were known."""
        self._flush()
        stop = start + len(cached)
        row, known = self._live.get(req) or (self._row(req), 0)
        if stop > known:
            self._events.append((Grow, row, known, stop))
            self._live[req] = row, stop
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
        if (live := self._live.pop(req, None)) is not None:
            self._events.append((Leave, live[0], self._time()))
        if self._also is not None:
            self._also.left(req)

    def lowered(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """What the level below has is in `Request.num_loaded_tokens`."""
        if self._also is not None:
            self._also.lowered(blocks, places)

    def forgotten(self, places: Sequence[int]) -> None:
        """As `lowered`."""
        if self._also is not None:
            self._also.forgotten(places)

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
        if self._row_of is not None:
            return self._row_of(req)
        row = self._rows.get(req)
        if row is None:
            row = self._rows[req] = len(self._requests)
            self._requests.append(req)
            self._texts.append(_Text(req.cache_salt, req.prompt_identities, req.output_token_ids))
        return row

    # ---- afterwards

    def take(self) -> list[RawEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def reuse(self) -> Reuse:
        """What the accesses so far come to."""
        self._flush()
        size, ids, texts = self._allocator.block_size, [req.request_id for req in self._requests], self._texts
        namer = _Namer(size)
        extend = lambda row, chain, stop: namer.extend(chain, texts[row], stop)  # noqa: E731
        raw = with_loaded(self._events, [req.num_loaded_tokens // size for req in self._requests])
        events = named_events(raw, extend, [(len(text.prompt) - 1) // size for text in texts])
        hits = optimal_hits(events, num_blocks_in_all(self._allocator), namer.num_keys, len(ids))
        return Reuse(size, ids, hits * size, reuse_stretches(events, hits, namer.num_keys))


def num_blocks_in_all(allocator: KVAllocator) -> int:
    """What the pool and the levels below it hold together, at no cost of the way up."""
    return allocator.num_blocks + sum(level.total for level in allocator.levels)


def with_loaded(raw: Sequence[RawEvent], num_loaded: Sequence[int] | Mapping[int, int]) -> list[RawEvent]:
    """Events in which a request found `num_loaded[row]` more blocks: those that came up later."""
    return [
        (*event[:4], event[4] + num_loaded[event[1]], *event[5:]) if event[0] is Ask and event[3] else event
        for event in raw
    ]


Extend = Callable[[int, list[int], int], list[int]]


def named_events(
    raw: Sequence[RawEvent], extend: Extend, most_wanted: Sequence[int] | Mapping[int, int]
) -> list[Event]:
    """Events with the numbers of their blocks.

    Args:
        raw: of a log.
        extend: given a row, the numbers of its first blocks, and how many of them are wanted: the same list with those.
        most_wanted: by row, how many blocks of its prompt can be hits.
    """
    chains: dict[int, list[int]] = {}
    events: list[Event] = []
    for kind, *what in raw:
        if kind is Room:
            events.append(Room(what[0]))
            continue
        row = what[0]
        if kind is Leave:
            events.append(Leave(row, what[1]))
            chains.pop(row, None)
        elif kind is Ask:
            _, known, counts, num_found, time = what
            chains[row] = chain = extend(row, [], known)
            wanted = most_wanted[row] if counts else 0
            events.append(Ask(row, _keys(chain), min(wanted, len(chain)), num_found, time))
        else:
            chain = extend(row, chains.setdefault(row, []), what[2])
            events.append(Grow(row, _keys(chain[what[1] :])))
    return events


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


def watch(
    allocator: KVAllocator, now: Callable[[], float], row_of: Callable[[Request], int] | None = None
) -> AccessLog | None:
    """Keep from now on what is asked of `allocator`; None without a prefix cache, or of one that is not empty.

    What it holds by then nobody asked for, so that no bound would be one.

    Args:
        allocator: of an engine.
        now, row_of: see AccessLog.
    """
    if not isinstance(allocator, PrefixCachingAllocator):
        return None
    if allocator.num_free_blocks - allocator.num_cached_blocks < allocator.num_blocks:
        return None
    before = None if isinstance(allocator.observer, AccessLog) else allocator.observer
    allocator.observer = log = AccessLog(allocator, now, before, row_of)
    return log
