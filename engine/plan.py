"""The contract between allocators, schedulers and the engine. Free of torch.

    Request -> Scheduler.add -> schedule() -> StepPlan -> ModelRunner.execute(plan) -> tokens -> Scheduler.update

A slot holds the KV of one token in every layer; a block is `block_size` consecutive slots. There is one address
formula, for every strategy:

    slot = block_table[pos // block_size] * block_size + pos % block_size

Block 0 is the null block: no request owns it, padding reads and writes go there. A pool of `num_blocks` blocks
hands out ids 1..num_blocks. A contiguous region is a block table of consecutive ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from engine.request import Request

NULL_BLOCK = 0
# The ledger's classes, in the order in which they are drawn and stored; engine/ledger.py says what they mean.
CLASSES = ("token_states", "reservation", "internal", "external", "shortage", "cached", "free")


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b for non-negative a and positive b."""
    return -(-a // b)


class CopyKind(Enum):
    """Where a block copy reads and writes."""

    DEVICE = "device"  # pool -> pool (copy-on-write, relocation)
    SWAP_OUT = "swap_out"  # pool -> host
    SWAP_IN = "swap_in"  # host -> pool


class BlockCopy(NamedTuple):
    """Copy one block of KV in every layer; applied before the step's forward, in list order."""

    kind: CopyKind
    src: int
    dst: int


class ScheduledRequest(NamedTuple):
    """Compute positions [start, start + num_new_tokens) of `req` in this step.

    `start` is a snapshot of `num_computed_tokens`: under overlap the request's own count moves on.
    """

    req: Request
    start: int
    num_new_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes.

    Attributes:
        scheduled: at most `max_num_seqs` entries, in total at most `max_num_batched_tokens` new tokens.
        samples: for each entry, whether the step reaches the request's last token and so samples one.
        admitted: requests whose stay in the pool began in this `schedule()` (admission, swap-in, fork), in order. Some
            are first scheduled in a later step: they own their slots all the same.
        preempted: requests that lost their slots in this `schedule()`; one that is admitted again is in both lists.
        copies: block copies that the runner applies before the forward.
        rejected: requests that ended in this `schedule()` with a typed error (they outgrew the pool alone).
        num_decodes: so many leading entries are known to compute one token each, past the prompt, of requests that ran
            before; there may be more. Whoever counts need not look at them one by one.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    rejected: list[Request] = field(default_factory=list)
    num_decodes: int = 0

    @property
    def num_new_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(entry.num_new_tokens for entry in self.scheduled)


class QueueHead(NamedTuple):
    """What the request that would be admitted next asks of the pool.

    Attributes:
        req: the request.
        num_tokens: positions that it must own to be admitted.
        parent: the running request whose prompt it would share (parallel sampling); None: it shares none.
    """

    req: Request
    num_tokens: int
    parent: Request | None = None


class KVUsage(NamedTuple):
    """The ledger's raw counts, in slots. `owned + external + shortage + cached + free == total`.

    What nobody owns is of one class per step, by the head of the queue: `shortage` if it needs more than all free and
    cached slots together, `external` if they would do and no hole is large enough, `free` otherwise and with no head.

    Attributes:
        total: slots of the pool, the null block left out.
        computed: slots that hold KV of computed tokens, each once however many requests share it.
        owned: slots that requests own, `computed` among them.
        external: free and enough in all for the head of the queue, but in no hole that is large enough; and what no
            request can ever own: buddy remainders, memory beyond the last page.
        shortage: free, but the head of the queue needs more than all free and cached slots together.
        cached: slots of prefix-cache blocks that no request uses: evictable.
        free: the rest.
        shared_saved: slots that sharing saved (the sum over requests of their slots, less `owned`).
    """

    total: int
    computed: int
    owned: int
    external: int
    shortage: int
    cached: int
    free: int
    shared_saved: int = 0


class KVAllocator(Protocol):
    """Who owns which slots. Knows blocks, never tensors.

    What a step writes becomes another request's context with `commit`, after that step was launched, and not before: a
    request that computes one token may read its context before the step's other writes are done.

    Attributes:
        block_size: slots per block.
        num_blocks: blocks in the pool, the null block left out; ids are 1..num_blocks.
        num_virtual_blocks: the largest id in a block table; above num_blocks only where ids are virtual.
        num_host_blocks: blocks of host memory that swapping uses, with ids 0..num_host_blocks - 1.
        contiguous: True when every block table is a run of consecutive ids.
        max_request_tokens: the largest request that an EMPTY pool can hold.
        commits: whether `commit` does anything.
        reads_tokens: whether token ids decide what a request owns (a prefix cache).
    """

    block_size: int
    num_blocks: int
    num_virtual_blocks: int
    num_host_blocks: int
    contiguous: bool
    commits: bool
    reads_tokens: bool

    @property
    def max_request_tokens(self) -> int:
        """The largest request, in tokens, that an empty pool can hold."""
        ...

    def match_prefix(self, req: Request) -> int:
        """Tokens of `req` that the prefix cache holds: block-aligned, at most num_tokens - 1. Changes nothing."""
        ...

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Own slots for positions [0, num_tokens) and set `req.num_slots`; all or nothing.

        Positions from `num_cached` (first call) or `req.num_computed_tokens` (later calls) on become writable:
        a shared block among them is copied. `num_cached` is what `match_prefix` just answered.
        """
        ...

    def commit(self, req: Request) -> None:
        """After a step: publish full blocks to the prefix cache, drop slid-out blocks."""
        ...

    def free(self, req: Request) -> None:
        """Give back everything that `req` owns, host blocks too, and set `req.num_slots` to 0. Idempotent."""
        ...

    def fork(self, req: Request, child: Request) -> bool:
        """Share the KV of `req`'s prompt, less its last token, with `child` (copy on write).

        Sets `child.num_computed_tokens`. False when the allocator cannot share: the child is then admitted like
        any other request.
        """
        ...

    def swap_out(self, req: Request) -> bool:
        """Move `req`'s KV to host memory and free its blocks. False: recompute instead."""
        ...

    def swap_in(self, req: Request) -> bool:
        """Bring a swapped request's KV back. False: no room now, nothing changed."""
        ...

    def block_table(self, req: Request) -> Sequence[int]:
        """Block ids by block index. May be longer than needed; slid-out entries are the null block."""
        ...

    def cached_blocks(self) -> Iterable[int]:
        """Blocks of the prefix cache that no request uses, for pictures of the pool."""
        ...

    def region_extent(self, num_blocks: int) -> int:
        """Consecutive blocks that a table of `num_blocks` takes from the pool, for pictures of it: those beyond the
        table are nobody's and external fragmentation.
        """
        ...

    def drain_copies(self) -> list[BlockCopy]:
        """Copies ordered since the last call; the runner applies them before the next forward."""
        ...

    def slots_to_admit(self, head: QueueHead) -> int:
        """Slots that admitting `head` takes from the free and the cached ones. Changes nothing."""
        ...

    def usage(self, head: QueueHead | None = None) -> KVUsage:
        """Raw counts of the ledger. `head` is the head of the queue: it decides what free slots are (`KVUsage`)."""
        ...


class SchedulerProtocol(Protocol):
    """What the engine needs of a scheduler; `schedulers.base.Scheduler` is the base of all of them."""

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that own slots and are computing."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, swapped ones included."""
        ...

    @property
    def held(self) -> Sequence[Request]:
        """Finished requests that still own their slots."""
        ...

    @property
    def has_priorities(self) -> bool:
        """Whether `Request.priority` decides anything."""
        ...

    def add(self, req: Request) -> None:
        """Queue a request. Raises RequestRejected when it can never run."""
        ...

    def abort(self, request_id: str) -> Request | None:
        """End a request wherever it is and free its slots; None when it is not here (any more)."""
        ...

    def fail(self, plan: StepPlan) -> list[Request]:
        """End every request of a step that the runner could not execute."""
        ...

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step at time `now` (seconds on the engine's clock)."""
        ...

    def update(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[Request]:
        """Take a step's tokens in: append, check stops, commit, free. Returns the finished requests.

        `sampled[i]` belongs to `plan.scheduled[i]` and is None where `plan.samples[i]` is False or the token was
        taken back.
        """
        ...

    def take_back(self, req: Request) -> None:
        """A running request's token of the step that is about to be taken in is void: it is sampled once more.

        The step's `sampled` holds None for it. No later step may have been planned.
        """
        ...

    def head(self) -> Request | None:
        """The request that would be admitted next, or None."""
        ...

    def queue_head(self) -> QueueHead | None:
        """The same request with what it asks of the pool, or None."""
        ...

    def wake_time(self, now: float) -> float | None:
        """When an empty plan may turn into work without a new arrival (a batch that waits to fill); None: never."""
        ...
