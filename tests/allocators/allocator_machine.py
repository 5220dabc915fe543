"""A hypothesis state machine for any allocator: it plays scheduler and runner, with a hash of the prefix as KV.

Every call is followed by a full audit (tables, references, the ledger); every forward reads back all that the
request attends to, so a block that was handed out twice, lost or left uncopied is found by its content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from hydra.utils import get_class
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarena.engine.contract import NULL_BLOCK, CopyKind, KVAllocator, QueueHead, cdiv
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.ledger import check_usage
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.strategies import build_allocator, strategy_names, strategy_options

SETTINGS = settings(
    max_examples=20, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
MAX_LEN = 32
_SHARED = [7, 7, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def make_request(
    name: str, prompt: list[int], max_tokens: int = 8, salt: str = "", oracle: int | None = None
) -> Request:
    """A request for tests."""
    return Request(name, list(prompt), SamplingParams(max_tokens=max_tokens), cache_salt=salt, oracle_output_len=oracle)


class Memory:
    """Device and host KV. The KV of a position is the tuple of all tokens up to it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.device: dict[int, tuple[int, ...]] = {}
        self.host: dict[int, tuple[int, ...]] = {}

    def apply(self, copies: list) -> None:
        for kind, src, dst, _ in copies:
            source = self.host if kind is CopyKind.SWAP_IN else self.device
            target = self.host if kind is CopyKind.SWAP_OUT else self.device
            for i in range(self.block_size):
                target[dst * self.block_size + i] = source.get(src * self.block_size + i, ())
        arrive_in_order(copies)

    def slot(self, table: list[int], pos: int) -> int:
        return table[pos // self.block_size] * self.block_size + pos % self.block_size

    def write(self, req: Request, table: list[int], start: int, stop: int) -> None:
        for pos in range(start, stop):
            assert table[pos // self.block_size] != NULL_BLOCK
            self.device[self.slot(table, pos)] = tuple(req.token_ids(0, pos + 1))

    def check(self, req: Request, table: list[int], window: int | None = None) -> None:
        low = 0 if window is None else max(0, req.num_computed_tokens - window)
        for pos in range(low, req.num_computed_tokens):
            assert self.device.get(self.slot(table, pos)) == tuple(req.token_ids(0, pos + 1)), (req.request_id, pos)


class AllocatorMachine(RuleBasedStateMachine):
    """Subclasses set `make`: a function that makes the allocator under test."""

    make: staticmethod
    window: int | None = None

    @initialize()
    def start(self) -> None:
        self.alloc: KVAllocator = self.make()
        self.memory = Memory(self.alloc.block_size)
        self.live: dict[str, Request] = {}
        self.waiting: dict[str, Request] = {}
        self.swapped: dict[str, Request] = {}
        self.planned: dict[str, SimpleNamespace] = {}
        self.count = 0

    # ---- helpers
    def _plan(self, req: Request, num_new: int) -> None:
        assert num_new > 0
        entry = SimpleNamespace(req=req, start=req.num_computed_tokens, stop=req.num_computed_tokens + num_new)
        assert entry.stop <= req.num_slots
        req.num_computed_tokens = entry.stop
        self.planned[req.request_id] = entry

    def _pick(self, data: st.DataObject, names: dict[str, Request] | list[str]) -> str:
        return data.draw(st.sampled_from(sorted(names)))

    def _idle(self) -> list[str]:
        return [name for name in self.live if name not in self.planned]

    def _forkable(self) -> list[str]:
        """Requests whose prompt, less its last token, was computed by steps before this one."""
        starts = {name: entry.start for name, entry in self.planned.items()}
        return [
            name
            for name, req in self.live.items()
            if starts.get(name, req.num_computed_tokens) >= req.num_prompt_tokens - 1
        ]

    # ---- rules
    @rule(
        data=st.data(),
        shared=st.sampled_from([0, 8, 16]),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        oracle=st.sampled_from([None, 3, 6]),
    )
    def arrive(self, data: st.DataObject, shared: int, own: list[int], oracle: int | None) -> None:
        req = make_request(f"r{self.count:03}", _SHARED[:shared] + own, oracle=oracle)
        self.count += 1
        self.waiting[req.request_id] = req
        if data.draw(st.booleans()):
            self._admit(req.request_id, 24, False)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), chunk=st.integers(1, 24), whole_life=st.booleans())
    def admit(self, data: st.DataObject, chunk: int, whole_life: bool) -> None:
        self._admit(self._pick(data, self.waiting), chunk, whole_life)

    def _admit(self, name: str, chunk: int, whole_life: bool) -> None:
        req = self.waiting[name]
        before = self.alloc.usage()
        hit = self.alloc.match_prefix(req)
        assert hit % self.alloc.block_size == 0 and hit <= req.num_tokens - 1
        assert self.alloc.match_prefix(req) == hit and self.alloc.usage() == before
        num_new = min(chunk, req.num_tokens - hit)
        if not self.alloc.allocate(req, req.max_total_tokens if whole_life else hit + num_new, hit):
            assert req.num_slots == 0 and self.alloc.usage() == before
            return
        req.num_computed_tokens = hit
        self.live[name] = self.waiting.pop(name)
        self._plan(req, num_new)

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), chunk=st.integers(1, 9))
    def grow(self, data: st.DataObject, chunk: int) -> None:
        self._grow(self._pick(data, self._idle()), chunk)

    @precondition(lambda self: self.live)
    @rule(num_steps=st.integers(1, 5))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for name in self._idle():
                self._grow(name, 24)
            self.audit()
            self.forward()

    def _grow(self, name: str, chunk: int) -> None:
        req = self.live[name]
        num_new = min(chunk, req.num_tokens - req.num_computed_tokens)
        end, slots, before = req.num_computed_tokens + num_new, req.num_slots, self.alloc.usage()
        if end <= slots or self.alloc.allocate(req, end):
            self._plan(req, num_new)
        else:
            assert req.num_slots == slots and self.alloc.usage() == before

    @precondition(lambda self: self.planned)
    @rule()
    def forward(self) -> None:
        self.memory.apply(self.alloc.drain_copies())
        for entry in self.planned.values():
            self.memory.write(entry.req, self.alloc.block_table(entry.req), entry.start, entry.stop)
        for name, entry in self.planned.items():
            self.memory.check(entry.req, self.alloc.block_table(entry.req), self.window)
            if entry.stop == entry.req.num_tokens:
                entry.req.output_token_ids.append(
                    (sum(entry.req.token_ids(0, entry.stop)) + entry.req.request_id.count(".")) % 2
                )
            self.alloc.commit(entry.req)
            if len(entry.req.output_token_ids) >= entry.req.sampling.max_tokens:
                self.alloc.free(self.live.pop(name))
        self.planned = {}

    @precondition(lambda self: self.live or self.swapped)
    @rule(data=st.data(), preempt=st.booleans())
    def drop(self, data: st.DataObject, preempt: bool) -> None:
        name = self._pick(data, self.live | self.swapped)
        req = self.live.pop(name, None) or self.swapped.pop(name)
        self.planned.pop(name, None)
        self.alloc.free(req)
        self.alloc.free(req)
        assert req.num_slots == 0
        req.num_computed_tokens = 0
        if preempt:
            self.waiting[name] = req

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        name = self._pick(data, self._idle())
        before = self.alloc.usage()
        if self.alloc.swap_out(self.live[name]):
            assert self.live[name].num_slots == 0
            self.swapped[name] = self.live.pop(name)
        else:
            assert self.alloc.usage() == before

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        name = self._pick(data, self.swapped)
        req, before = self.swapped[name], self.alloc.usage()
        if self.alloc.swap_in(req):
            assert req.num_slots >= req.num_computed_tokens
            self.live[name] = self.swapped.pop(name)
        else:
            assert self.alloc.usage() == before

    @precondition(lambda self: self._forkable())
    @rule(data=st.data(), as_beam=st.booleans())
    def fork(self, data: st.DataObject, as_beam: bool) -> None:
        parent = self.live[self._pick(data, self._forkable())]
        child = make_request(f"{parent.request_id}.{self.count}", parent.prompt_token_ids)
        self.count += 1
        before, num_prompt = self.alloc.usage(), parent.num_prompt_tokens
        num_shared, asked = num_prompt - 1, None
        if as_beam:  # any positions that steps before this one computed; another token comes behind them
            entry = self.planned.get(parent.request_id)
            computed = parent.num_computed_tokens if entry is None else entry.start
            num_shared = asked = data.draw(st.integers(0, min(computed, child.max_total_tokens - 1)))
            if num_shared >= num_prompt:
                child.output_token_ids += [*parent.output_token_ids[: num_shared - num_prompt], 1]
        if self.alloc.fork(parent, child, asked):
            assert child.num_computed_tokens == num_shared
            self.live[child.request_id] = child
        else:
            assert child.num_slots == 0 and self.alloc.usage() == before

    # ---- audit
    @invariant()
    def audit(self) -> None:
        if not hasattr(self, "alloc"):
            return
        alloc, block_size = self.alloc, self.alloc.block_size
        head = next(iter(self.waiting.values()), None)
        usage = alloc.usage(QueueHead(head, head.num_tokens) if head else None)
        check_usage(usage)
        assert usage.total == alloc.num_blocks * block_size
        refs: Counter[int] = Counter()
        filled: Counter[int] = Counter()
        for req in self.live.values():
            table = alloc.block_table(req)
            assert req.num_slots <= len(table) * block_size and req.num_computed_tokens <= len(table) * block_size
            if alloc.contiguous:
                assert all(b - a == 1 for a, b in pairwise(table))
            refs.update(table)
            for i, block in enumerate(table[: cdiv(req.num_computed_tokens, block_size)]):
                filled[block] = max(filled[block], min(block_size, req.num_computed_tokens - i * block_size))
        num_slid = refs.pop(NULL_BLOCK, 0)
        filled.pop(NULL_BLOCK, None)
        assert self.window is not None or num_slid == 0
        assert usage.computed == sum(filled.values())
        if alloc.num_virtual_blocks == alloc.num_blocks:  # ids are physical
            assert set(refs) <= set(range(1, alloc.num_blocks + 1))
            assert usage.owned == len(refs) * block_size
            assert usage.shared_saved == (refs.total() - len(refs)) * block_size

        self.audit_more()

    def audit_more(self) -> None:
        """What is particular to an allocator."""

    def teardown(self) -> None:
        if not hasattr(self, "alloc"):
            return
        for req in [*self.live.values(), *self.swapped.values(), *self.waiting.values()]:
            self.alloc.free(req)
        self.alloc.drain_copies()
        check_whole(self.alloc)


def registered_cases(known: Collection[Any]) -> dict[str, tuple[partial, dict]]:
    """A machine's `make` and attributes for every file of conf/allocator whose class is not in `known`."""
    cases: dict[str, tuple[partial, dict]] = {}
    for name in strategy_names("allocator"):
        options = strategy_options("allocator", name)
        if get_class(options["_target_"]) in known:
            continue
        small = {key: value for key, value in {"block_size": 4, "swap_blocks": 9}.items() if key in options}
        cases[name] = partial(build_allocator, name, num_blocks=17, **small), {}
        if "sliding_window" in options:
            cases[f"{name}-window"] = partial(cases[name][0], sliding_window=6), {"window": 6}
    return cases


def check_whole(alloc: KVAllocator) -> None:
    """The pool is whole: nothing owned, and the largest request that an empty pool can hold fits again."""
    usage = alloc.usage()
    assert usage.owned == usage.computed == usage.shared_saved == 0, usage
    req = make_request("whole", [1] * alloc.max_request_tokens, max_tokens=1)
    assert alloc.allocate(req, alloc.max_request_tokens)
    alloc.free(req)
    assert alloc.usage() == usage._replace(cached=0, free=usage.free + usage.cached)
