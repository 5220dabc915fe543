"""A request's way through a scheduler: queued, admitted, grown, preempted, ended. Says how, never who is next.

enqueue -> waiting -> admit -> prefilling -> decoding -> finish
              ^         |  ^       |            |
              |      loading       |            |           what a level below holds of it comes up
              '----- preempt ------'------------'

What beams do beside that is in `beams.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from kvarena.engine.contract import KVAllocator, StepPlan, StepScheduler, check_choice, check_int, is_number, require
from kvarena.engine.request import FinishReason, Request, RequestStatus
from kvarena.schedulers.queue import RequestQueue

PREEMPTIONS = ("recompute", "swap", "none")
# Who loses its slots when the pool runs dry: the highest score, and of several whoever arrived last, as in vLLM.
VICTIMS: dict[str, Callable[[Request], int]] = {
    "last_arrived": lambda _req: 0,  # PagedAttention, SOSP'23, section 4.5
    "lowest_priority": lambda req: req.priority,  # whichever scheduler runs
    "most_blocks": lambda req: req.num_slots,  # the fewest preemptions, and the longest recomputation
}


class Lifecycle(StepScheduler):
    """Who waits and who runs, and every change between the two. Arguments and attributes: see `Scheduler`."""

    shares_prompts = True  # children of parallel sampling wait for their parent's prompt and fork it
    _set_by_base = "requests"

    def __init__(
        self,
        allocator: KVAllocator,
        *,
        max_model_len: int,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_num_batched_tiles: int = 16,
        watermark: float = 0.01,
        preemption: str = "recompute",
        victim: str = "last_arrived",
    ) -> None:
        require(max_model_len >= 2, "engine.max_model_len", max_model_len, "at least 2 (one prompt, one output token)")
        check_int("scheduler.max_num_seqs", max_num_seqs, 1)
        check_int("scheduler.max_num_batched_tokens", max_num_batched_tokens, 1)
        check_int("scheduler.max_num_batched_tiles", max_num_batched_tiles, 1)
        require(is_number(watermark) and 0 <= watermark < 1, "scheduler.watermark", watermark, "in [0, 1)")
        check_choice("scheduler.preemption", preemption, PREEMPTIONS)
        check_choice("scheduler.victim", victim, VICTIMS)
        self.allocator = allocator
        self.max_model_len = max_model_len
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_batched_tiles = max_num_batched_tiles
        self.preemption = preemption
        self._victim = victim
        self.requests: dict[str, Request] = {}
        self.prefilling: dict[Request, None] = {}
        self.decoding: dict[Request, None] = {}
        self.holding: dict[Request, None] = {}
        self.loading: dict[Request, None] = {}
        self.arrival: dict[Request, int] = {}  # order of `add`
        self._watermark_slots = int(watermark * allocator.num_blocks * allocator.block_size)
        self._queue = RequestQueue()
        self._children: dict[Request, list[Request]] = {}  # wait for the key's prompt
        self._num_lost: dict[Request, int] = {}  # tokens computed once and dropped by a preemption
        self._unreported: list[Request] = []  # preempted in steps that computed nothing
        self._arrivals = count()

    @property
    def has_priorities(self) -> bool:
        return self._victim == "lowest_priority" and self.preemption != "none"

    # ---- policy hooks

    def order_key(self, req: Request) -> Any:
        """Place of `req` in the queue, ascending; fixed while it waits. By rank by default."""
        return self.rank(req)

    def rank(self, req: Request) -> Any:
        """Who is protected from preemption: the smallest. Never changes; first come first served by default."""
        return self.arrival[req]

    def pick_victim(self) -> Request:
        """The running request to preempt; the best-ranked one, and who goes with it, only when nobody else runs."""
        candidates = [*self.decoding, *self.prefilling, *self.holding]
        best = min(candidates, key=self.rank)
        return self.worst([req for req in candidates if not self.are_one(req, best)] or candidates)

    def are_one(self, req: Request, other: Request) -> bool:
        """Whether they lose their slots together."""
        return req is other

    def retire(self, req: Request) -> None:
        """A running request ended: give its slots back."""
        self.allocator.free(req)

    # ---- the queue; a policy with a queue of its own overrides these three (and asks `beams.py` first, as fair does)

    def head(self) -> Request | None:
        return self._queue.peek()

    def enqueue(self, req: Request) -> None:
        """Put `req` in its place in the queue."""
        self._queue.push(req, self.order_key(req))

    def dequeue(self, req: Request) -> None:
        """Take `req` out of the queue."""
        self._queue.remove(req)

    # ---- admission

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding) + len(self.holding) + len(self.loading)

    @property
    def is_idle(self) -> bool:
        """Nobody gets on: nobody runs, or those that do wait for one that does not."""
        return not (self.prefilling or self.decoding or self.loading)

    def has_seat(self, req: Request) -> bool:  # noqa: ARG002
        """Whether `req` may run beside those that do, as far as their number goes."""
        return self.num_running < self.max_num_seqs

    def admit(self, req: Request, plan: StepPlan) -> bool:
        """Move `req` from the queue to `prefilling`, with slots for every token that it has.

        Or to `loading`, where a level below the pool holds some of it: it computes when that is there.

        False when there is no room now, or when there never will be: then it ended, and is in `plan.rejected`.
        Must come before `schedule_prefills` in a step: a fork copies KV that an earlier step computed.
        """
        if req.num_pending_tokens:  # preempted while a step was in flight: its last token is not here yet
            return False
        if not self._take_slots(req):
            if not self._others_run(req) and self.allocator.next_arrival() is None:
                error = (
                    f"request {req.request_id!r} needs slots for {self.num_slots_to_admit(req)} tokens, which the "
                    "empty KV pool cannot give; raise kv_cache.num_blocks or shorten the request"
                )
                plan.rejected.append(req)
                self.finish(req, FinishReason.ERROR, error)
            return False
        self.dequeue(req)
        req.status = RequestStatus.RUNNING
        num_loading = self.allocator.load(req)
        if num_loading and req.num_preemptions == 0:
            req.num_cached_tokens += num_loading
            req.num_loaded_tokens = num_loading
        (self.loading if num_loading else self.prefilling)[req] = None
        plan.admitted.append(req)
        return True

    def loaded(self, requests: Sequence[Request]) -> None:
        for req in requests:
            if req in self.loading:  # else it ended meanwhile
                del self.loading[req]
                self.prefilling[req] = None

    def num_slots_to_admit(self, req: Request) -> int:
        """Positions that `req` must own to be admitted."""
        return req.max_total_tokens if self.preemption == "none" else req.num_tokens

    def _take_slots(self, req: Request) -> bool:
        """Own slots for `req`, by swapping in, forking, or from scratch; all or nothing."""
        allocator, num_slots = self.allocator, self.num_slots_to_admit(req)
        if req.status is RequestStatus.SWAPPED:
            if self._above_watermark(req, num_slots) and allocator.swap_in(req):
                if allocator.allocate(req, num_slots):
                    return True
            elif self._others_run(req) or allocator.next_arrival() is not None:
                return False
            # Back from the host, but no room for the next token (or no way back at all): compute it again.
            self._drop(req)
        parent, num_shared = self.shared_with(req)
        if parent is not None:
            if not self._above_watermark(req, num_slots - num_shared):
                return False
            if allocator.fork(parent, req, num_shared):
                if allocator.allocate(req, num_slots):
                    return True
                allocator.free(req)
                req.num_computed_tokens = 0
                return False
        num_cached = allocator.match_prefix(req)
        if not self._above_watermark(req, num_slots - num_cached) or not allocator.allocate(req, num_slots, num_cached):
            return False
        if req.num_preemptions == 0:
            req.num_cached_tokens = num_cached
        req.num_computed_tokens = num_cached
        return True

    def shared_with(self, req: Request) -> tuple[Request | None, int]:
        """The running request whose KV `req` may share when it is admitted, and how many positions of it."""
        parent = req.parent
        if not self.shares_prompts or parent is None or parent not in self.decoding:
            return None, 0
        return parent, parent.num_prompt_tokens - 1

    def _others_run(self, req: Request) -> bool:  # noqa: ARG002
        """Whether some request runs whose end would make room for `req`, which does not run."""
        return self.num_running > 0

    def _above_watermark(self, req: Request, num_new_slots: int) -> bool:
        """Whether the pool keeps its reserve when `req` takes so many slots; always when no other would get on."""
        if self._watermark_slots == 0 or self.is_idle or not self._others_run(req):
            return True
        usage = self.allocator.usage()
        return usage.total - usage.owned - num_new_slots >= self._watermark_slots

    # ---- growth and preemption

    def grow(self, req: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Own slots for [0, num_tokens), preempting others if need be. False: `req` itself was preempted."""
        while not self.allocator.allocate(req, num_tokens):
            self.preempt(self.pick_victim(), plan)
            if req.status is not RequestStatus.RUNNING:
                return False
        return True

    def worst(self, candidates: Iterable[Request]) -> Request:
        """The victim among `candidates`, by the victim policy."""
        return max(candidates, key=lambda req: (VICTIMS[self._victim](req), self.arrival[req]))

    def preempt(self, req: Request, plan: StepPlan) -> None:
        """Take a running request's slots away and queue it again."""
        self.take_away(req, plan)
        self.enqueue(req)

    def take_away(self, req: Request, plan: StepPlan, *, may_swap: bool = True) -> None:
        """Take a running request's slots away."""
        for i, (other, start, _) in enumerate(plan.scheduled):
            if other is req:  # it was planned already
                req.num_pending_tokens -= plan.samples[i]
                req.num_recomputed_tokens -= self._recomputed(req, start, req.num_computed_tokens)
                req.num_computed_tokens = start
                del plan.scheduled[i], plan.samples[i]
                plan.num_decodes -= i < plan.num_decodes
                break
        self._remove_running(req)
        plan.preempted.append(req)
        req.num_preemptions += 1
        if may_swap and self.preemption == "swap" and self.allocator.swap_out(req):
            req.status = RequestStatus.SWAPPED
        else:
            self._drop(req)

    # ---- the end

    def finish(self, req: Request, reason: FinishReason, error: str = "") -> None:
        """End `req` wherever it is."""
        req.status, req.finish_reason, req.error = RequestStatus.FINISHED, reason, error
        if req in self.decoding or req in self.prefilling or req in self.holding or req in self.loading:
            self._remove_running(req)
            self.retire(req)
        else:
            siblings = self._children.get(req.parent, []) if req.parent is not None else []
            if req in siblings:
                siblings.remove(req)
            else:
                self.dequeue(req)
            self.allocator.free(req)
        self._release_children(req)
        self._num_lost.pop(req, None)
        del self.arrival[req], self.requests[req.request_id]

    def _drop(self, req: Request) -> None:
        """Give back what `req` owns. It computes from scratch, or from what the prefix cache still holds."""
        self.allocator.free(req)
        self._num_lost[req] = max(self._num_lost.get(req, 0), req.num_computed_tokens)
        req.num_computed_tokens = 0
        req.status = RequestStatus.WAITING

    def _recomputed(self, req: Request, start: int, end: int) -> int:
        """How many of the positions [start, end) had been computed before."""
        return max(0, min(end, self._num_lost.get(req, 0)) - start)

    def _remove_running(self, req: Request) -> None:
        for running in (self.decoding, self.prefilling, self.holding, self.loading):
            running.pop(req, None)

    def _release_children(self, parent: Request) -> None:
        for child in self._children.pop(parent, ()):
            self.enqueue(child)
