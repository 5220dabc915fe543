"""The contract between allocators, schedulers and the engine. Free of torch.

    Request -> Scheduler.add -> schedule() -> StepPlan -> ModelRunner.execute(plan) -> tokens -> Scheduler.update

A slot holds the KV of one token in every layer; a block is `block_size` consecutive slots. There is one address
formula, for every strategy:

    slot = block_table[pos // block_size] * block_size + pos % block_size

Block 0 is the null block: no request owns it, padding reads and writes go there. A pool of `num_blocks` blocks
hands out ids 1..num_blocks. A contiguous region is a block table of consecutive ids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvarena.engine import checks, copies, step_times, usage
from kvarena.engine.checked import Checked
from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.engine.request import Request

# How allocators and schedulers check their options; they see no other module of the engine's.
check_choice = checks.check_choice
check_int = checks.check_int
check_number = checks.check_number
is_number = checks.is_number
require = checks.require
# What a scheduler may be told of steps.
StepTimes = step_times.StepTimes
# What allocators order of the runner.
BlockCopy = copies.BlockCopy
CopyKind = copies.CopyKind
Transfer = copies.Transfer
# What they say.
CacheObserver = usage.CacheObserver
KVUsage = usage.KVUsage
LevelUsage = usage.LevelUsage

NULL_BLOCK = 0


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b for non-negative a and positive b."""
    return -(-a // b)


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
        forked: beams that took over another beam's tokens since the step before: what is kept of them by name is void.
            Those that run are `admitted` too.
        copies: block copies that the runner applies before the forward.
        rejected: requests that ended in this `schedule()` with a typed error (they outgrew the pool alone).
        num_decodes: so many leading entries are known to compute one token each, past the prompt, of requests that ran
            before; there may be more. Whoever counts need not look at them one by one.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    forked: list[Request] = field(default_factory=list)
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
        parent: the running request whose KV it would share (parallel sampling, beams); None: it shares none.
        num_shared: positions of that.
    """

    req: Request
    num_tokens: int
    parent: Request | None = None
    num_shared: int = 0


class KVAllocator(metaclass=Checked):
    """Base of all allocators: who owns which slots. Knows blocks, never tensors.

    What is abstract here each allocator writes; the rest answers for one that cannot share, cache or swap.

    Args:
        num_blocks: blocks of the pool, the null block left out; ids are 1..num_blocks.
        block_size: slots per block, 1 to 256.
        max_model_len: most tokens that a request may have.
        kv_bytes_per_token: bytes of one token's KV in every layer; 0 where there are none (tests, simulation).
        sliding_window: positions that a token attends to, itself included; older blocks are given back. None: all.

    Attributes:
        num_virtual_blocks: the largest id in a block table; above num_blocks only where ids are virtual.
        num_host_blocks: blocks of host memory that swapping uses, with ids 0..num_host_blocks - 1.
        contiguous: True when every block table is a run of consecutive ids.
        no_window: why this allocator takes no sliding window; None where it does.
        commits: whether `commit` does anything; without, nobody need call it.
        reads_tokens: whether token ids decide what a request owns (a prefix cache).
        observer: told of the prefix cache's blocks, by an allocator that has one; set while the cache is empty.
        levels: the books of the levels below the pool; none where nothing is kept there.
        is_moving: whether copies of a transfer are under way, and so `arrive` must be called.

    Raises:
        ConfigError: a value out of range.
        NotDefined: a window is asked of an allocator that cannot give slid-out blocks back.
    """

    contiguous: bool = False
    no_window: str | None = None
    commits: bool = False
    reads_tokens: bool = False
    num_host_blocks: int = 0
    observer: CacheObserver | None = None
    levels: Sequence[LevelUsage] = ()
    is_moving: bool = False
    _set_by_base = "kv_bytes_per_token"

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        kv_bytes_per_token: int = 0,
        sliding_window: int | None = None,
    ) -> None:
        if sliding_window is not None:
            check_int("allocator.sliding_window", sliding_window, 1)
            if self.no_window is not None:
                raise NotDefined(
                    f"allocator.sliding_window={sliding_window} cannot be combined with this allocator: "
                    f"{self.no_window}; use allocator=paged"
                )
        self.sliding_window = sliding_window
        self.block_size = check_int("allocator.block_size", block_size, 1, 256)
        if isinstance(num_blocks, int) and num_blocks < 1:
            raise ConfigError(
                f"a KV pool of {num_blocks} blocks of {block_size} tokens holds nothing; raise kv_cache.num_blocks or "
                "kv_cache.memory_gib, or lower allocator.block_size"
            )
        self.num_blocks = self.num_virtual_blocks = check_int("kv_cache.num_blocks", num_blocks, 1)
        self.max_model_len = check_int("engine.max_model_len", max_model_len, 1)
        self.kv_bytes_per_token = check_int("kv_bytes_per_token", kv_bytes_per_token, 0)

    @property
    @abstractmethod
    def max_request_tokens(self) -> int:
        """The largest request, in tokens, that an empty pool can hold."""

    def max_requests(self, num_tokens: int) -> int:
        """Requests of so many tokens each, sharing nothing, that an empty pool holds at once.

        Whole blocks, or regions with what they are rounded up by.
        """
        return self.num_blocks // self.region_extent(cdiv(num_tokens, self.block_size))

    @abstractmethod
    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Own slots for positions [0, num_tokens) and set `req.num_slots`; all or nothing.

        Positions from `num_cached` (first call) or `req.num_computed_tokens` (later calls) on become writable:
        none among them is shared. `num_cached` is what `match_prefix` just answered.
        """

    @abstractmethod
    def free(self, req: Request) -> None:
        """Give back everything that `req` owns, host blocks too, and set `req.num_slots` to 0. Idempotent."""

    @abstractmethod
    def block_table(self, req: Request) -> Sequence[int]:
        """Block ids by block index. May be longer than needed; slid-out entries are the null block."""

    @abstractmethod
    def count(self) -> KVUsage:
        """Raw counts with nobody in the queue: what no request can ever own is external, the rest is free."""

    def match_prefix(self, req: Request) -> int:  # noqa: ARG002
        """Tokens of `req` that the prefix cache holds: block-aligned, at most num_tokens - 1. Changes nothing."""
        return 0

    def commit(self, req: Request) -> None:
        """After a step was launched: drop slid-out blocks, publish full ones. Not before: a request that computes one
        token may read its context before the step's other writes are done. `block_table(req)` then, by position:

            |  slid out   |     published      |     own, filled      |  own, empty  |
            |  null block |  shared, read only |  written by req      |  req's to write without asking
            0             w                    p                      c              s

        w: whole blocks before the sliding window (0 without one). p: full blocks of known tokens, the prefix cache's (w
        without one; none has both). c: `num_computed_tokens`. s: `num_slots`. After a fork parent and child share the
        full blocks of the positions that it shared.
        """

    @property
    def forks(self) -> bool:
        """Whether requests can share what they did not find in a cache: beams need that."""
        return type(self).fork is not KVAllocator.fork

    def fork(self, req: Request, child: Request, num_tokens: int | None = None) -> bool:  # noqa: ARG002
        """Share the KV of `req`'s first positions with `child`; who writes into a block has it alone.

        Args:
            req: has computed them.
            child: has the same tokens there, and owns nothing.
            num_tokens: how many; None: the prompt less its last token.

        Sets `child.num_computed_tokens` and `child.num_slots`. False when the allocator cannot share, or has no room
        for a copy: the child is then admitted like any other request.
        """
        return False

    def swap_out(self, req: Request) -> bool:  # noqa: ARG002
        """Move `req`'s computed KV to host memory and free its blocks. False: no room there, or nothing to move."""
        return False

    def swap_in(self, req: Request) -> bool:  # noqa: ARG002
        """Bring a swapped request's KV back. False: no room now, nothing changed."""
        return False

    def drain_copies(self) -> list[BlockCopy]:
        """Copies ordered since the last call; the runner applies them before the next forward."""
        return []

    def load(self, req: Request) -> int:  # noqa: ARG002
        """Bring up what levels below hold of `req`, which was just admitted, behind its computed tokens.

        Returns:
            The tokens on their way. Until `arrive` answers `req` it computes nothing; `free` ends that too.
        """
        return 0

    def arrive(self, now: float) -> list[Request]:  # noqa: ARG002
        """Take in the transfers that have arrived at `now`.

        Returns:
            Requests of which all is there that `load` ordered; their `num_computed_tokens` have moved on.
        """
        return []

    def next_arrival(self) -> float | None:
        """When the next blocks are there that a request waits for, or that are nobody's any more; None: no such."""
        return None

    def abandon(self, copies: Iterable[BlockCopy]) -> list[Request]:  # noqa: ARG002
        """A step failed that had these copies: transfers of which nobody knows an arrival never arrive.

        Returns:
            The requests that wait for one of them, and must be freed.
        """
        return []

    def landing_blocks(self) -> Sequence[int]:
        """Blocks that are nobody's and not free: copies into them, which `load` ordered, are still to arrive."""
        return ()

    def cached_blocks(self) -> Iterable[int]:
        """Blocks of the prefix cache that no request uses, for pictures of the pool."""
        return ()

    def clear_cache(self) -> None:
        """Forget every cached block that no request owns, so that a measured run starts cold."""

    def region_extent(self, num_blocks: int) -> int:
        """Consecutive blocks that a table of `num_blocks` takes from the pool, for pictures of it: those beyond the
        table are nobody's and external fragmentation.
        """
        return num_blocks

    def slots_to_admit(self, head: QueueHead) -> int:
        """Slots that admitting `head` takes from the free and the cached ones: whole blocks. Changes nothing."""
        return cdiv(head.num_tokens, self.block_size) * self.block_size

    def has_hole(self, head: QueueHead) -> bool:  # noqa: ARG002
        """Whether enough slots lie as `head` needs them: any free block serves anyone. Changes nothing."""
        return True

    def usage(self, head: QueueHead | None = None) -> KVUsage:
        """Raw counts. The one place that says what free slots are to the head of the queue.

        A cached block serves the head too, as a hit or evicted for it: only a need beyond both is a shortage. What a
        policy holds back (a watermark, a full batch) is no property of the slots: they are free.
        """
        usage = self.count()
        if head is None or not usage.free:
            return usage
        if self.slots_to_admit(head) > usage.free + usage.cached:
            return usage._replace(shortage=usage.free, free=0)
        if not self.has_hole(head):
            return usage._replace(external=usage.external + usage.free, free=0)
        return usage


class StepScheduler(metaclass=Checked):
    """What the engine asks of a scheduler; `kvarena.schedulers.base.Scheduler` is the base that policies build on."""

    _set_by_base = ""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """True while a request waits or runs."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Requests that own slots and are computing."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Requests in the queue, swapped ones and children that wait for their parent's prompt included."""

    @property
    def held(self) -> Sequence[Request]:
        """Finished requests that still own their slots."""
        return ()

    @property
    def has_priorities(self) -> bool:
        """Whether `Request.priority` decides anything."""
        return False

    @property
    def waiting_by_client(self) -> Mapping[str, int] | None:
        """Requests in the queue of each `Request.client_id` that has some; None where that decides nothing."""
        return None

    @property
    def wants_step_times(self) -> bool:
        """Whether it plans by what steps take, and does not know it yet."""
        return False

    def set_step_times(self, times: StepTimes) -> None:
        """Told what steps take, before the first request; only who wants to know is told."""

    def check_search(self, width: int) -> None:
        """Raise NotDefined unless beam searches of `width` can run here."""
        raise NotDefined(
            f"a beam search of width {width} needs a scheduler that moves beams together, and this one does not; use "
            "scheduler=chunked or scheduler=continuous"
        )

    def note_saved(self, num_kv_tokens: int) -> None:
        """Told when another number of tokens of KV was not read in the last step, because another decode's read served.

        Those who plan by what steps take need it: `StepTimes` counts what each decode reads.
        """

    @abstractmethod
    def add(self, req: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use.
            RequestRejected: it can never run here.
        """

    @abstractmethod
    def abort(self, request_id: str) -> Request | None:
        """End a request wherever it is and free its slots; None when it is not here (any more)."""

    @abstractmethod
    def fail(self, plan: StepPlan) -> list[Request]:
        """End every request of a step that the runner could not execute."""

    @abstractmethod
    def schedule(self, now: float) -> StepPlan:
        """Plan the next step at time `now` (seconds on the engine's clock)."""

    @abstractmethod
    def update(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[Request]:
        """Take a step's tokens in: append, check stops, commit, free. Returns the finished requests.

        Beams have their tokens in their search (`BeamSearch.draw`), and None here.

        `sampled[i]` belongs to `plan.scheduled[i]` and is None where `plan.samples[i]` is False or the token was
        taken back.
        """

    @abstractmethod
    def take_back(self, req: Request) -> None:
        """A running request's token of the step that is about to be taken in is void: it is sampled once more.

        The step's `sampled` holds None for it. No later step may have been planned.
        """

    def loaded(self, requests: Sequence[Request]) -> None:
        """What `KVAllocator.load` brought up for these is there: they may compute."""

    @abstractmethod
    def head(self) -> Request | None:
        """The request that would be admitted next, or None."""

    @abstractmethod
    def queue_head(self) -> QueueHead | None:
        """The same request with what it asks of the pool, or None."""

    def wake_time(self, now: float) -> float | None:  # noqa: ARG002
        """When an empty plan may turn into work without a new arrival (a batch that waits to fill); None: never."""
        return None
