"""What an observer of a prefix cache is told, and what a subscriber makes of it, is what the cache holds."""

from __future__ import annotations

import hashlib
import struct
from functools import partial

import cbor2
import pytest
from allocator_machine import MAX_LEN, SETTINGS, AllocatorMachine, make_request
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from kv_subscriber import Subscriber

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.request import ImageSpan, Request, SamplingParams
from kvarena.engine.server.engine.cache_events import CacheEvents
from kvarena.experiments.settings.strategies import build_allocator, strategy_names

ALLOCATORS = {name: build_allocator(name, num_blocks=9, max_model_len=MAX_LEN) for name in strategy_names("allocator")}
CACHING = [name for name, allocator in ALLOCATORS.items() if allocator.reads_tokens]


def cached_prefixes(alloc: PrefixCachingAllocator, block_size: int) -> set[tuple[int, ...]]:
    """All prefixes of whole blocks that a request would find, by asking: no look into the allocator."""
    found = set()
    for tokens in list(alloc.asked):
        hit = alloc.match_prefix(make_request("probe", [*tokens, 1]))
        found |= {tokens[:end] for end in range(block_size, hit + 1, block_size)}
    return found


class EventMachine(AllocatorMachine):
    """Everything that may befall an allocator; after each call the subscriber knows what there is."""

    def audit_more(self) -> None:
        alloc = self.alloc
        if alloc.observer is None:
            alloc.observer = self.events = CacheEvents(alloc.block_size)
            self.subscriber, alloc.asked = Subscriber(), set()
        alloc.arrive(0.0)
        self.subscriber.take(self.events.take())
        held, below = self.subscriber.held, self.subscriber.below
        assert set(held.values()) | set(below.values()) <= {1}
        if alloc.levels:
            level = alloc._moves.level
            assert len(below) == len(level._held)
        index = alloc._index
        assert len(held) == sum(block in index for block in range(1, alloc.num_blocks + 1))
        alloc.asked |= {
            tuple(req.token_ids(0, req.num_tokens)) for req in [*self.live.values(), *self.waiting.values()]
        }
        known = {self.subscriber.prefix[name] for name in held}
        assert cached_prefixes(alloc, alloc.block_size) <= known


@pytest.mark.parametrize("name", CACHING)
@pytest.mark.parametrize("block_size", (4, 1))
def test_a_subscriber_knows_what_the_cache_holds_whatever_happens(name, block_size):
    pool = {"num_blocks": 17 if block_size == 4 else 60, "block_size": block_size, "swap_blocks": 9}
    make = partial(build_allocator, name, max_model_len=MAX_LEN, **pool)
    machine = type("Machine", (EventMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=15))


@pytest.mark.parametrize("name", CACHING)
def test_a_subscriber_knows_what_host_memory_holds_whatever_happens(name):
    pool = {"num_blocks": 17, "block_size": 4, "swap_blocks": 9, "host_blocks": 15, "eviction": "lru"}
    make = partial(build_allocator, name, max_model_len=MAX_LEN, **pool)
    machine = type("Machine", (EventMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=15))


def compute(alloc, name, tokens, **more):
    req = make_request(name, tokens, **more)
    assert alloc.allocate(req, len(tokens), alloc.match_prefix(req))
    req.num_computed_tokens = len(tokens)
    alloc.commit(req)
    return req


def observed(kind=PrefixCachingAllocator, num_blocks=20):
    alloc = kind(num_blocks=num_blocks, block_size=4, max_model_len=64)
    alloc.observer = CacheEvents(4)
    return alloc, alloc.observer


def by_hand(parent: bytes, tokens: tuple[int, ...], keys: tuple | None = None) -> bytes:
    return hashlib.sha256(cbor2.dumps((parent, tokens, keys), canonical=True)).digest()


ROOT_HASH = hashlib.sha256(cbor2.dumps("vllm-none-hash", canonical=True)).digest()


def number(digest: bytes) -> int:
    return struct.unpack(">Q", digest[-8:])[0]


@pytest.mark.parametrize("kind", (PrefixCachingAllocator, RadixAllocator))
def test_hashes_are_those_of_vllm(kind):
    """sha256_cbor, chained; the salt in the first block, an image by its digest and where it begins."""
    alloc, events = observed(kind)
    alloc.free(compute(alloc, "a", list(range(10))))
    first = by_hand(ROOT_HASH, (0, 1, 2, 3))
    second = by_hand(first, (4, 5, 6, 7))
    [event] = events.take()
    assert event == {
        "type": "BlockStored", "block_hashes": [number(first), number(second)], "parent_block_hash": None,
        "token_ids": list(range(8)), "block_size": 4, "lora_id": None, "medium": "GPU", "lora_name": None,
        "group_idx": 0,
    }  # fmt: skip
    compute(alloc, "b", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    [event] = events.take()
    assert event["parent_block_hash"] == number(second) and event["token_ids"] == [8, 9, 10, 11]
    compute(alloc, "c", list(range(8)), salt="mine")
    [event] = events.take()
    salted = by_hand(ROOT_HASH, (0, 1, 2, 3), (("cache_salt", "mine"),))
    assert event["block_hashes"] == [number(salted), number(by_hand(salted, (4, 5, 6, 7)))]
    assert event["extra_keys"] == [["mine"], None]


def test_images_are_told_apart_by_their_digests():
    alloc, events = observed()
    images = (ImageSpan(2, 6, 1 << 200, 1),)
    req = Request("a", [5, 9, 300, 300, 300, 300, 7, 8], SamplingParams(max_tokens=8), images=images)
    assert alloc.allocate(req, 8)
    req.num_computed_tokens = 8
    alloc.commit(req)
    [event] = events.take()
    name = f"{1 << 200:x}"
    first = by_hand(ROOT_HASH, (5, 9, 300, 300), (("mm", name, 2),))
    assert event["block_hashes"] == [number(first), number(by_hand(first, (300, 300, 7, 8), (("mm", name, -2),)))]
    assert event["token_ids"] == req.prompt_token_ids and event["extra_keys"] == [[[name, 2]], [[name, -2]]]


def test_what_is_evicted_and_what_is_cleared():
    alloc, events = observed(num_blocks=4)
    alloc.free(compute(alloc, "a", list(range(8))))
    stored = events.take()[0]["block_hashes"]
    alloc.free(compute(alloc, "b", list(range(50, 63))))  # all four blocks
    removed = [event for event in events.take() if event["type"] != "BlockStored"]
    assert removed == [{"type": "AllBlocksCleared"}] or removed[0]["block_hashes"] == stored[::-1]
    alloc.clear_cache()
    assert events.take() == [{"type": "AllBlocksCleared"}]
    alloc.clear_cache()
    assert events.take() == []
