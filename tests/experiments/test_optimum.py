"""MIN against every way to keep blocks, and against the policies: nothing finds more."""

from __future__ import annotations

import random

import pytest
from optimum_traces import prompts, with_locks

from kvarena.allocators.eviction_policies import policy_names
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.caching.accesses import watch
from kvarena.experiments.caching.optimum import Ask, Event, Leave, optimal_hits
from kvarena.experiments.caching.plain_replay import endless_hits, num_distinct, replay_min, replay_policy


def brute_force(events: list[Event], num_blocks: int) -> int:
    """The most hits of all ways to keep blocks: after each event any of those that are there, if they fit."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    owners: dict[int, list[int]] = {}
    for event in events:
        before = {key for keys in owners.values() for key in keys}
        if isinstance(event, Ask):
            owners[event.row] = event.keys.tolist()
        else:
            assert isinstance(event, Leave)
            released = set(owners.pop(event.row))
        after = {key for keys in owners.values() for key in keys}
        reached: dict[frozenset[int], int] = {}
        for kept, hits in states.items():
            here = set(kept)
            if isinstance(event, Ask):
                for key in event.keys[: event.num_wanted].tolist():
                    if key not in here and key not in before:
                        break
                    hits += 1
            else:
                here |= released
            here -= after
            room = num_blocks - len(after)
            for some in subsets(sorted(here), room):
                reached[some] = max(reached.get(some, 0), hits)
        states = reached
    return max(states.values())


def subsets(keys: list[int], most: int) -> list[frozenset[int]]:
    """All subsets of at most `most` keys that are not in a larger one which fits: to keep less never helps."""
    from itertools import combinations

    return [frozenset(some) for some in combinations(keys, min(most, len(keys)))]


def test_min_equals_brute_force_on_200_random_traces_with_locks() -> None:
    hits = 0
    for seed in range(200):
        rng = random.Random(seed)
        num_blocks = 1 + seed % 12
        trace = prompts(rng, rng.randint(4, 8), rng.choice([2, 3, 4]), rng.choice([1, 2, 2, 3]))
        events = with_locks(rng, trace, num_blocks)
        best = optimal_hits(events, num_blocks, num_distinct(trace), len(trace))
        assert best.sum() == brute_force(events, num_blocks), (seed, num_blocks, events)
        hits += int(best.sum())
    assert hits > 500  # the traces have something to find


def policies_find_no_more(seeds: range) -> None:
    names = policy_names()
    found = dict.fromkeys(names, 0)
    most = 0
    for seed in seeds:
        rng = random.Random(seed)
        trace = prompts(rng, rng.randint(5, 40), rng.choice([2, 4, 8]), rng.choice([1, 2, 3]))
        num_blocks = rng.randint(1, 24)
        best, endless = replay_min(trace, num_blocks), endless_hits(trace)
        assert (best <= endless).all()
        most += int(best.sum())
        for name in names:
            hits, policy = replay_policy(trace, num_blocks, name, ghosts=rng.choice([0, 1, 8]))
            assert hits.sum() <= best.sum(), (seed, name)
            assert policy.needs_future or policy.num_remembered <= policy.max_ghosts
            found[name] += int(hits.sum())
    assert found["min"] == most  # knowing the future, and refusing blocks that nobody asks for, a policy finds it all
    assert all(0 < hits < most for name, hits in found.items() if name != "min"), found


def test_no_policy_finds_more_than_min() -> None:
    policies_find_no_more(range(60))


@pytest.mark.slow
def test_no_policy_finds_more_than_min_in_10_000_traces() -> None:
    policies_find_no_more(range(10_000))


# ---- the bound of a run


def drive(make: type[PrefixCachingAllocator], policy: str, seed: int) -> tuple[list[int], list[int], int]:
    """A random run on an allocator alone: hits of each request and MIN's, in tokens, and evicted blocks."""
    rng = random.Random(seed)
    alloc = make(num_blocks=rng.randint(8, 20), block_size=2, max_model_len=64, eviction=policy)
    if alloc.policy.needs_future:
        alloc.policy.foresee([])
    log = watch(alloc, lambda: 0.0)
    assert log is not None and alloc.observer is log
    live: list[Request] = []
    asked: list[Request] = []
    evicted: list[int] = []
    log._also = type("Counter", (), {  # a second observer hears the same
        "removed": lambda self, blocks: evicted.extend(blocks), "found": lambda self, req, blocks: None,
        "stored": lambda self, req, table, start, cached: None, "left": lambda self, req: None,
    })()  # fmt: skip
    for number in range(60):
        while live and (rng.random() < 0.4 or len(live) > 3):
            req = live.pop(rng.randrange(len(live)))
            alloc.free(req)
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
        req = Request(f"r{number}", prompt, SamplingParams(max_tokens=9))
        hit = alloc.match_prefix(req)
        if not alloc.allocate(req, len(prompt), hit):
            continue
        req.num_cached_tokens = hit
        asked.append(req)
        req.num_computed_tokens = len(prompt)
        alloc.commit(req)
        for _ in range(rng.randint(0, 5)):  # it decodes, as long as there is room
            req.output_token_ids.append(rng.randrange(2))
            if not alloc.allocate(req, req.num_tokens):
                req.output_token_ids.pop()
                break
            req.num_computed_tokens = req.num_tokens
            alloc.commit(req)
        live.append(req)
    reuse = log.reuse()
    best = dict(zip(reuse.request_ids, reuse.optimal_tokens.tolist(), strict=True))
    return [req.num_cached_tokens for req in asked], [best[req.request_id] for req in asked], len(evicted)


@pytest.mark.parametrize("policy", policy_names())
def test_a_run_finds_no_more_than_its_bound_and_both_indexes_find_the_same(policy: str) -> None:
    """Requests that run beside each other, decode, and find what others generated."""
    for seed in range(6):
        hits, best, evicted = drive(PrefixCachingAllocator, policy, seed)
        assert sum(hits) <= sum(best) and evicted
        assert drive(RadixAllocator, policy, seed)[:2] == (hits, best)


def test_a_cache_that_holds_something_has_no_bound() -> None:
    alloc = PrefixCachingAllocator(num_blocks=8, block_size=2, max_model_len=64)
    first = watch(alloc, lambda: 0.0)
    second = watch(alloc, lambda: 0.0)  # in its place
    assert first is not None and second is not None and alloc.observer is second and second._also is None
    req = Request("r", [1, 2, 3], SamplingParams(max_tokens=1))
    assert alloc.allocate(req, 3)
    req.num_computed_tokens = 3
    alloc.commit(req)
    alloc.free(req)
    assert watch(alloc, lambda: 0.0) is None
