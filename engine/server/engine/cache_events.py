"""What a prefix cache holds, as events in vLLM's wire format (https://docs.vllm.ai: KV cache events).

    allocator --blocks--> CacheEvents --BlockStored, BlockRemoved, AllBlocksCleared--> EventPublisher

A block is named by a chain of hashes, so that equal prefixes have equal names on every server:

    hash[i] = SHA-256 of the canonical CBOR of (hash[i - 1], tokens[i], extra keys[i] or null)

which is vLLM's `--prefix-caching-hash-algo sha256_cbor` without a seed; on the wire it is an integer, its last 8 bytes.
Extra keys tell blocks of equal tokens apart: the cache salt in the first block, and an image by its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import cbor2

from kvarena.engine.contract import CacheObserver
from kvarena.engine.request import Request

# The tier that attention reads, wherever it lies, and host memory below it: the names that subscribers know them by.
GPU, CPU = "GPU", "CPU"
SEED = "vllm-none-hash"


def digest(*parts: Any) -> bytes:
    """The hash of a block, from its predecessor's, its tokens and its extra keys; or of the seed alone."""
    return sha256(cbor2.dumps(parts if len(parts) > 1 else parts[0], canonical=True)).digest()


NOTHING = digest(SEED)


def wire_hash(block_digest: bytes) -> int:
    """A digest as it is published."""
    return int.from_bytes(block_digest[-8:], "big")


class Both:
    """Two observers of an allocator as one."""

    def __init__(self, first: CacheObserver, second: CacheObserver) -> None:
        self._observers = first, second

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.found(req, blocks)

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.stored(req, table, start, cached)

    def removed(self, blocks: Sequence[int]) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.removed(blocks)

    def left(self, req: Request) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.left(req)

    def lowered(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.lowered(blocks, places)

    def forgotten(self, places: Sequence[int]) -> None:
        """See CacheObserver."""
        for one in self._observers:
            one.forgotten(places)


class CacheEvents:
    """The observer of an allocator; its events are taken once a step.

    Args:
        block_size: tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._digests: dict[int, bytes] = {}  # of the blocks that the cache holds
        self._below: dict[int, bytes] = {}  # of those that the level below holds, by place
        self._chains: dict[Request, list[bytes]] = {}  # of the first blocks of requests that own some
        self._events: list[dict[str, Any]] = []

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def cleared(self) -> None:
        """Nothing is cached: what was told before is void."""
        self._digests.clear()
        self._below.clear()
        self._events = [{"type": "AllBlocksCleared"}]

    # What the allocator tells.

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """The hashes of what a request shares are known."""
        self._chains[req] = [self._digests[block] for block in blocks]

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """One event for each run of blocks that were not told before."""
        chain = self._chains.setdefault(req, [])
        for index in range(len(chain), start + len(cached)):
            before = chain[-1] if chain else NOTHING
            chain.append(digest(before, self._tokens(req, index), self._keys(req, index)))
        run: list[int] = []
        for index, is_cached in enumerate(cached, start):
            if is_cached and table[index] not in self._digests:
                self._digests[table[index]] = chain[index]
                run.append(index)
            elif run:
                self._tell(req, chain, run)
                run = []
        if run:
            self._tell(req, chain, run)

    def removed(self, blocks: Sequence[int]) -> None:
        """One event for what was evicted together, or for all that there was."""
        self._tell_gone([self._digests.pop(block) for block in blocks], GPU)

    def left(self, req: Request) -> None:
        """Its hashes are not needed any more; those of its blocks are."""
        self._chains.pop(req, None)

    def lowered(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """One event for what goes down together. Tokens and chains were told when the blocks were stored."""
        digests = [self._digests[block] for block in blocks]
        self._below.update(zip(places, digests, strict=True))
        self._events.append({
            "type": "BlockStored", "block_hashes": [wire_hash(one) for one in digests], "parent_block_hash": None,
            "token_ids": [], "block_size": self._block_size, "lora_id": None, "medium": CPU, "lora_name": None,
            "group_idx": 0,
        })  # fmt: skip

    def forgotten(self, places: Sequence[int]) -> None:
        """As `removed`, of the level below."""
        self._tell_gone([self._below.pop(place) for place in places], CPU)

    # Events.

    def _tell_gone(self, digests: Sequence[bytes], medium: str) -> None:
        if digests and not (self._digests or self._below):
            self._events.append({"type": "AllBlocksCleared"})
        elif digests:
            hashes = [wire_hash(one) for one in digests]
            self._events.append({"type": "BlockRemoved", "block_hashes": hashes, "medium": medium})

    def _tokens(self, req: Request, index: int) -> tuple[int, ...]:
        return tuple(req.token_ids(index * self._block_size, (index + 1) * self._block_size))

    def _tell(self, req: Request, chain: list[bytes], run: list[int]) -> None:
        first, size = run[0], self._block_size
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [wire_hash(chain[index]) for index in run],
            "parent_block_hash": wire_hash(chain[first - 1]) if first else None,
            "token_ids": req.token_ids(first * size, (first + len(run)) * size),
            "block_size": size,
            "lora_id": None,
            "medium": GPU,
            "lora_name": None,
        }
        keys = [self._keys(req, index) for index in run]
        if any(keys):
            event["extra_keys"] = [None if one is None else [_untagged(key) for key in one] for one in keys]
        event["group_idx"] = 0
        self._events.append(event)

    def _keys(self, req: Request, index: int) -> tuple[Any, ...] | None:
        """What a block's hash covers beside its tokens, each with where it comes from."""
        start, stop = index * self._block_size, (index + 1) * self._block_size
        keys: list[Any] = [
            ("mm", f"{image.identity:x}", image.start - start)
            for image in req.images
            if image.start < stop and start < image.stop
        ]
        if not index and req.cache_salt:
            keys.append(("cache_salt", req.cache_salt))
        return tuple(keys) or None


def _untagged(key: tuple[Any, ...]) -> Any:
    return key[1] if len(key) == 2 else list(key[1:])
