"""Eviction policies: what each promises, how one is found, what it costs, and what none can break."""

from __future__ import annotations

import math
import random
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from allocator_machine import MAX_LEN, SETTINGS, AllocatorMachine, make_request
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvarena.allocators.eviction_order import Entry, EvictionOrder, EvictionPolicy
from kvarena.allocators.eviction_policies import make_policy, policy_names
from kvarena.allocators.ghosts import Ghosts
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request

INDEXES = (PrefixCachingAllocator, RadixAllocator)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "strategies.md"


class Bench:
    """A cache of single blocks under a policy, without an allocator: a name is a block, `a/b` one behind `a`."""

    def __init__(self, policy: str, size: int, **options: Any) -> None:
        ghosts = options.pop("ghosts", 8)
        self.policy = make_policy(policy, num_blocks=size, block_size=16, ghosts=ghosts, options=options)
        self.order, self.size = EvictionOrder(self.policy), size
        self.entries: dict[str, Entry] = {}

    def use(self, *names: str) -> None:
        """Requests for single blocks, one after the other, their parents there."""
        for name in names:
            req = Request(name, [0])
            entry = self.entries.get(name)
            if entry is None:
                parent = self.entries.get(name.rpartition("/")[0])
                entry = self.entries[name] = Entry(parent, len(self.entries) + 1, hash(name))
                if self.order.inserted is not None:
                    self.order.inserted(entry, req)
            else:
                self.order.take(entry)
                self.order.hit([entry], req)
            self.order.release(entry)
            if self.order.num_evictable > self.size:
                self.evict()

    def evict(self) -> str:
        """Evict one block; its name."""
        [gone] = self.order.evict(1)
        name = next(name for name, entry in self.entries.items() if entry is gone)
        del self.entries[name]
        return name

    def order_of(self) -> str:
        """All blocks, in the order in which they go."""
        return "".join(self.evict() for _ in range(self.order.num_evictable))


@pytest.mark.parametrize(
    ("policy", "uses", "goes"),
    [
        ("lru", "abcab", "cab"),
        ("fifo", "abcab", "abc"),
        ("lfu", "abcabb", "cab"),
        ("lfu", "aabbcdc", "dabc"),
        ("slru", "abcad", "bcda"),  # a is protected
        ("slru", "aabcd", "bcda"),
        ("s3fifo", "abcdaefghij", "bcdefghiaj"),  # a goes on into the main queue
        ("cost", "abcab", "cab"),  # equal costs, and nothing aged yet: as they were released
        ("gdsf", "abcab", "cab"),
        ("workload", "abcab", "cab"),  # of one kind, and no time passes
        ("ageing", "abcab", "cab"),
        ("min", "abc", "abc"),  # nobody asks for any of them
    ],
)
def test_the_order_in_which_blocks_go(policy: str, uses: str, goes: str) -> None:
    bench = Bench(policy, 12)
    bench.use(*uses)
    assert bench.order_of() == goes


def test_lfu_counts_on_where_an_evicted_block_was_and_forgets_without_ghosts() -> None:
    for ghosts, uses in ((8, 2), (0, 1)):
        bench = Bench("lfu", 2, ghosts=ghosts)
        bench.use(*"aabbc")  # c goes at once
        assert set(bench.entries) == {"a", "b"} and bench.policy.num_remembered == bool(ghosts)
        bench.size = 3
        bench.use("c")
        assert bench.entries["c"].uses == uses


def test_slru_protects_no_more_than_its_share() -> None:
    bench = Bench("slru", 10, protected=0.2)
    bench.use(*"aabbcc")
    assert [bench.entries[name].lane for name in "abc"] == [0, 1, 1]  # a was demoted for c
    assert bench.order_of() == "abc"


def test_arc_learns_from_its_ghosts_which_queue_needs_room() -> None:
    bench = Bench("arc", 4)
    bench.use(*"aabb", *"cdefgh")  # a and b were used again; one-timers come and go
    assert {"a", "b"} <= set(bench.entries)
    target = bench.policy._target
    gone = next(name for name in "cdefgh" if name not in bench.entries)
    bench.use(gone)
    assert bench.policy._target > target and bench.entries[gone].lane == 1


def test_cost_keeps_the_end_of_a_long_prompt_before_a_short_one() -> None:
    """Attention is quadratic: the 2,000th block takes longer to compute than a first one."""
    policy = make_policy("cost", num_blocks=10, block_size=16, ghosts=0, options={})
    entry, first = None, Entry(None, 1)
    for number in range(2000):
        entry = Entry(entry, number + 2)
    assert entry is not None and policy.price(entry) > 2 * policy.price(first)
    flat = make_policy("cost", num_blocks=10, block_size=16, ghosts=0, options={"pair_cost": 0})
    assert flat.price(entry) == flat.price(first)


def test_ageing_is_lru_until_a_shadow_finds_more() -> None:
    """Documents that come back between one-time prompts: after some rounds uses count; where none do, they do not."""
    rng = random.Random(0)
    bench = Bench("ageing", 200)
    for number in range(12000):
        bench.use(f"doc{rng.randrange(100)}" if rng.random() < 0.3 else f"once{number}")
    assert bench.policy._age > 0
    assert sum(name.startswith("doc") for name in bench.entries) > 90  # LRU keeps half of them
    lru = Bench("lru", 200)
    for number in range(12000):
        lru.use(f"doc{rng.randrange(100)}" if rng.random() < 0.3 else f"once{number}")
    assert sum(name.startswith("doc") for name in lru.entries) < 80


def test_min_goes_by_what_comes_next_whoever_overtakes() -> None:
    bench = Bench("min", 3)
    names = [*"abcabac", "d"]
    bench.policy.foresee([(f"{place}", [hash(name)]) for place, name in enumerate(names)])
    for place, name in enumerate(names[:3]):
        req, entry = Request(f"{place}", [0]), Entry(None, place + 1, hash(name))
        bench.entries[name] = entry
        assert bench.order.inserted is not None
        bench.order.inserted(entry, req)
        bench.order.release(entry)
    assert [bench.policy._next(bench.entries[name]) for name in "abc"] == [3, 4, 6]
    bench.policy._begin(Request("3", [0]))
    bench.policy._begin(Request("6", [0]))  # overtakes
    assert [bench.policy._next(bench.entries[name]) for name in "abc"] == [5, 4, float("inf")]
    bench.policy.repriced = True
    assert bench.order_of() == "cab"


# ---- what no policy can break


class Hostile(EvictionPolicy):
    """Prices at random, spares whom it likes, admits nobody in particular."""

    num_lanes = 3

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.rng = random.Random(1)

    def price(self, entry: Entry) -> float:
        return self.rng.choice([-1.0, 0.0, float("inf"), float("nan"), self.rng.random()])

    def hit(self, entry: Entry, req: Request) -> None:
        entry.lane = self.rng.randrange(3)
        self.move(entry)

    def admits(self, entry: Entry) -> bool:
        return self.rng.random() < 0.5

    def spares(self, entry: Entry) -> bool:
        return True

    def next_lane(self) -> int:
        self.repriced = self.rng.random() < 0.1
        return self.rng.randrange(3)


def paths_are_whole(machine: AllocatorMachine) -> None:
    """Whatever a policy says: owned blocks are not evictable, and no published block lacks one before it."""
    alloc = machine.alloc
    assert isinstance(alloc, PrefixCachingAllocator)
    owned = {block for req in machine.live.values() for block in alloc.block_table(req)}
    cached = list(alloc.cached_blocks())
    assert len(set(cached)) == len(cached) == alloc.num_cached_blocks and not owned & set(cached)
    entries = entries_of(alloc)
    for entry in entries:
        assert entry.block and (entry.parent is None or entry.parent in entries)
        assert entry.num_children == sum(other.parent is entry for other in entries)
        assert entry.in_use == (entry.block in owned)
        assert not entry.in_use or entry.parent is None or entry.parent.in_use


def entries_of(alloc: PrefixCachingAllocator) -> set[Entry]:
    if not isinstance(alloc, RadixAllocator):
        return set(alloc._index._published.values())  # type: ignore[attr-defined]
    stack, found = [alloc._index.root], set()
    while stack:
        node = stack.pop()
        found |= set(node.entries)
        stack += node.children.values()
    return found


HOSTILE = f"{__name__}.Hostile"
# Each policy in one of the two, and one that means harm in both: that they agree is shown elsewhere.
PAIRS = [(INDEXES[i % 2], name) for i, name in enumerate(policy_names())] + [(index, HOSTILE) for index in INDEXES]


@pytest.mark.parametrize(("index", "policy"), PAIRS)
def test_owned_blocks_stay_and_children_go_first(index: type[PrefixCachingAllocator], policy: str) -> None:
    make = partial(index, num_blocks=13, block_size=2, max_model_len=MAX_LEN, swap_blocks=5, eviction=policy)
    machine = type("Any", (AllocatorMachine,), {"make": staticmethod(make), "audit_more": paths_are_whole})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=3, stateful_step_count=30))


# ---- how one is found


def test_a_policy_from_an_empty_file_as_the_documentation_has_it(tmp_path, monkeypatch) -> None:
    """The six steps of docs/strategies.md, in another repository."""
    steps = DOCS.read_text(encoding="utf-8").split("## Add an eviction policy in 6 steps")[1].split("\n## ")[0]
    code = steps.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_policies.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for index in INDEXES:
            alloc = index(
                num_blocks=3, block_size=4, max_model_len=64, eviction="my_policies.MinePolicy",
                eviction_options={"seed": 1},
            )  # fmt: skip
            for token in range(20):
                req = make_request(str(token), [token] * 8)
                assert alloc.allocate(req, 8)
                req.num_computed_tokens = 8
                alloc.commit(req)
                alloc.free(req)
            assert alloc.usage().cached == 12 and type(alloc.policy).__name__ == "MinePolicy"
    finally:
        sys.modules.pop("my_policies", None)


def test_an_installed_policy_is_a_name(monkeypatch) -> None:
    from importlib.metadata import EntryPoint

    from kvarena.allocators import eviction_policies

    point = EntryPoint("hostile", f"{__name__}:Hostile", eviction_policies.ENTRY_POINTS)
    monkeypatch.setattr(eviction_policies, "entry_points", lambda group: [point])
    assert "hostile" in policy_names()
    alloc = PrefixCachingAllocator(num_blocks=3, block_size=4, max_model_len=64, eviction="hostile")
    assert isinstance(alloc.policy, EvictionPolicy) and type(alloc.policy).__name__ == "Hostile"


class Abstract(EvictionPolicy):
    """Lacks its price."""


class Silent(EvictionPolicy):
    """Does not call its base."""

    def __init__(self, **sizes: Any) -> None:
        del sizes

    def price(self, entry: Entry) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eviction": "mru"}, "allocator.eviction=mru is no policy; take one of ageing, arc"),
        ({"eviction": ""}, "must be a policy's name"),
        ({"eviction": "nowhere.Mine"}, "cannot be loaded: No module named 'nowhere'"),
        ({"eviction": f"{__name__}.Nobody"}, "cannot be loaded"),
        ({"eviction": f"{__name__}.Bench"}, "is no policy; derive the class from"),
        ({"eviction": f"{__name__}.Abstract"}, "Abstract lacks price"),
        ({"eviction": f"{__name__}.Silent"}, r"must call super\(\).__init__"),
        ({"ghosts": -1}, "allocator.ghosts=-1"),
        ({"eviction": "lru", "eviction_options": {"small": 1}}, "lru has no option small; it has none"),
        ({"eviction": "slru", "eviction_options": {"small": 1}}, "slru has no option small; it has protected"),
        ({"eviction": "slru", "eviction_options": {"protected": 1}}, "protected=1 must be a share"),
        ({"eviction": "s3fifo", "eviction_options": {"small": 0}}, "small=0 must be a share"),
        ({"eviction": "cost", "eviction_options": {"pair_cost": -1}}, "pair_cost=-1"),
    ],
)
def test_mistakes_are_lines(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        PrefixCachingAllocator(num_blocks=3, block_size=4, max_model_len=64, **options)


# ---- what it costs


@pytest.mark.parametrize("policy", ["ageing", "lfu", "arc"])
def test_what_is_remembered_is_bounded_and_takes_200_bytes_an_entry(policy: str) -> None:
    num_blocks = 300
    for ghosts in (0, 8):
        tracemalloc.start()
        made = make_policy(policy, num_blocks=num_blocks, block_size=16, ghosts=ghosts, options={})
        order, rng = EvictionOrder(made), random.Random(0)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(12 * num_blocks):
            entry = Entry(None, 1, hash((number if rng.random() < 0.5 else rng.randrange(2000), 7)))
            assert order.inserted is not None
            order.inserted(entry, Request("r", [0]))
            order.release(entry)
            if order.num_evictable > num_blocks:
                order.evict(1)
        del entry
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        most = ghosts * num_blocks
        assert made.num_remembered <= made.max_ghosts == most
        assert made.num_bytes <= 200 * most + 4096
        # The blocks themselves and their queue: at most 500 bytes each.
        assert grown <= 500 * num_blocks + 200 * most + 20_000


def test_ghosts_keep_the_latest() -> None:
    ghosts = Ghosts(10)
    for digest in range(100):
        ghosts.remember(digest, digest)
    assert 5 <= len(ghosts) <= 10 and ghosts.recall(99) == 99 and ghosts.recall(99) == 0 and ghosts.recall(50) == 0
    assert not len(Ghosts(0)) and Ghosts(1).recall(3) == 0


class KindBench(Bench):
    """Requests for single blocks that have a kind and a time."""

    def ask(self, name: str, kind: str, time: float) -> bool:
        """Whether it was there."""
        req = Request(name, [0], arrival_time=time, kind=kind)
        entry = self.entries.get(name)
        if found := entry is not None:
            self.order.take(entry)
            self.order.hit([entry], req)
        else:
            entry = self.entries[name] = Entry(None, len(self.entries) + 1, hash(name))
            if self.order.inserted is not None:
                self.order.inserted(entry, req)
        self.order.release(entry)
        while self.order.num_evictable > self.size:
            self.evict()
        return found


def test_the_kind_that_comes_again_outlives_the_one_that_does_not() -> None:
    """Every chat comes back after 60 s, no document does, and ten documents come for each chat."""
    hits = {}
    for policy in ("lru", "workload"):
        bench, hits[policy] = KindBench(policy, 40), 0
        for second in range(3000):
            for i in range(1 if second % 60 else 10):
                bench.ask(f"document {second} {i}", "file-1", second)
            if second % 10 == 0:
                hits[policy] += bench.ask(f"chat {second}", "text-1", second)
                hits[policy] += second >= 60 and bench.ask(f"chat {second - 60}", "text-2", second)
    assert hits["lru"] == 0 and hits["workload"] > 0.9 * 294


def test_a_kind_s_chance_is_the_exponential_that_its_blocks_follow() -> None:
    """Half of the blocks of a kind come again, 20 s later in the mean; of the other kind all, after 200 s."""
    rng, size, life = random.Random(0), 20_000, 30.0
    bench = KindBench("workload", size, life=life)
    uses = []
    for number in range(6000):
        time = number * 0.5
        kind, share, mean = (("a", 0.5, 20.0), ("b", 1.0, 200.0))[number % 2]
        uses.append((time, f"{number}", kind))
        if rng.random() < share:
            uses.append((time + rng.expovariate(1 / mean), f"{number}", "last"))
    for time, name, kind in sorted(uses):
        bench.ask(name, kind, time)
    policy: Any = bench.policy
    policy._settle()
    for kind, share, mean in (("a", 0.5, 20.0), ("b", 1.0, 200.0)):
        for seconds in (0.0, 15.0, 100.0):
            wanted = share * (math.exp(-seconds / mean) - math.exp(-(seconds + life) / mean))
            assert policy.chance(policy.kinds[kind], seconds) == pytest.approx(wanted, rel=0.15, abs=0.004)


def test_what_comes_too_late_is_learnt_from_ghosts() -> None:
    """Chats come back when documents have long pushed them out; with ghosts that is known, and then they are kept."""
    found = {}
    for ghosts in (0, 8):
        bench, found[ghosts] = KindBench("workload", 30, ghosts=ghosts), 0
        for second in range(4000):
            bench.ask(f"document {second}", "file-1", second)
            if second % 20 == 0:
                bench.ask(f"chat {second}", "text-1", second)
                found[ghosts] += second >= 100 and bench.ask(f"chat {second - 100}", "text-2", second)
    assert found[0] == 0 and found[8] > 150


def test_kinds_beyond_the_64th_are_one() -> None:
    bench = KindBench("workload", 300)
    for number in range(200):
        bench.ask(f"{number}", f"kind {number}", number)
    policy: Any = bench.policy
    assert len(policy.kinds) == 64 and len(policy._counts) == 65
    assert {entry.lane for entry in bench.entries.values()} == set(range(65))
    assert len(bench.order_of()) > 200


def test_without_kinds_it_is_lru() -> None:
    rng = random.Random(1)
    names = [f"{rng.randrange(60)}" for _ in range(3000)]
    found = {}
    for policy in ("lru", "workload"):
        bench = KindBench(policy, 20)
        found[policy] = [bench.ask(name, "", float(time)) for time, name in enumerate(names)]
    assert found["lru"] == found["workload"] and sum(found["lru"])


def test_a_preempted_request_that_comes_back_is_no_new_use() -> None:
    alloc = PrefixCachingAllocator(num_blocks=8, block_size=4, max_model_len=64, eviction="lfu")
    req = make_request("a", [1] * 9)
    for preemptions, uses in ((0, 1), (1, 1), (0, 2)):
        req.num_preemptions = preemptions
        assert alloc.allocate(req, 9, alloc.match_prefix(req))
        req.num_computed_tokens = 9
        alloc.commit(req)
        alloc.free(req)
        req.num_computed_tokens = 0
        assert {entry.uses for entry in entries_of(alloc)} == {uses}


def test_each_policy_stands_in_the_config_and_in_the_documentation() -> None:
    config = (DOCS.parents[1] / "conf" / "base" / "prefix_cache.yaml").read_text(encoding="utf-8")
    table = DOCS.read_text(encoding="utf-8").split("## Eviction")[1].split("### How far")[0]
    for name in policy_names():
        assert f"{name} |" in config or f"{name}," in config
        assert f"\n| `{name}`" in table and f"`{name}.py`" in table
