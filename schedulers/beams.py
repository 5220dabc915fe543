"""What a beam search adds to its beams' way through a scheduler: they move, wait and lose their slots together.

    prompt     beam 0 computes it | the others fork it, as parallel samples do
    a round    decoding --drawn--> holding --the last one is drawn--> all move: in place, or as another one's heir
    queued     before all others: those of its search that run wait for it, and their seats are its own
    an heir    gives its KV back, takes the tokens over and forks them; without room for that it is queued
    preempted  all at once. Beam 0 comes back first, the others fork what they have in common with a running one

A round's tokens are drawn step by step where beams are not in step: one that comes back computes more than a token.
All-or-nothing as in PagedAttention (SOSP'23), section 4.5; there swapped groups keep their sharing in host memory, here
beam 0 alone is swapped, and what the others do not share with it is computed again.
"""

from __future__ import annotations

from typing import Any

from kvarena.engine.contract import KVAllocator, StepPlan, cdiv
from kvarena.engine.errors import NotDefined, RequestRejected
from kvarena.engine.request import FinishReason, Request, RequestStatus
from kvarena.schedulers.lifecycle import Lifecycle
from kvarena.schedulers.queue import RequestQueue


class BeamLifecycle(Lifecycle):
    """Moves the beams of searches. Arguments and attributes: see `Scheduler`."""

    def __init__(self, allocator: KVAllocator, **options: Any) -> None:
        super().__init__(allocator, **options)
        self._searches: dict[Any, list[Request]] = {}  # a BeamSearch's beams, by number
        self._joining = RequestQueue()  # beams of searches of which one runs
        self._forked: list[Request] = []  # heirs that no step has been told of

    # ---- who may come

    def check_search(self, width: int) -> None:
        name = type(self.allocator).__name__
        if not self.allocator.forks:
            raise NotDefined(
                f"a beam search forks its beams' KV, and {name} shares none; use allocator=paged, paged_prefix or radix"
            )
        if not self.shares_prompts:
            raise NotDefined(
                "a beam search forks its beams' KV, and under this scheduler no request shares another's; use "
                "scheduler=chunked or scheduler=continuous"
            )
        if width > self.max_num_seqs:
            raise NotDefined(
                f"a beam search of width {width} is more than run at once, scheduler.max_num_seqs={self.max_num_seqs}; "
                "raise that, or search fewer beams"
            )

    def add_beam(self, req: Request) -> None:
        """Take in a beam that was added. Raises RequestRejected when not all of them would ever fit."""
        search, size = req.search, self.allocator.block_size
        assert search is not None
        # What they share for certain is the full blocks of the prompt less its last token, and of a window nothing.
        shared = 0 if self.allocator.sliding_window is not None else (req.num_prompt_tokens - 1) // size
        need = shared + search.width * (cdiv(req.max_total_tokens, size) - shared)
        room = self.allocator.max_request_tokens
        if need * size > room:
            raise RequestRejected(
                f"request {req.request_id!r}: {search.width} beams of prompt {req.num_prompt_tokens} + max_tokens "
                f"{req.sampling.max_tokens} may need {need * size} tokens, over the {room} that the empty KV pool can "
                "hold; search fewer beams, shorten the request or raise kv_cache.num_blocks",
                reason="max_request_tokens",
            )
        self._searches.setdefault(search, []).append(req)

    def has_seat(self, req: Request) -> bool:
        """A search is let in with seats for all of its beams."""
        if not self._searches:
            return super().has_seat(req)
        taken = self.num_running
        for beams in self._searches.values():
            num_running = sum(beam.status is RequestStatus.RUNNING for beam in beams)
            if num_running:
                taken += len(beams) - num_running
                if beams[0].search is req.search:
                    return True
        return taken + (1 if req.search is None else req.search.width) <= self.max_num_seqs

    def shared_with(self, req: Request) -> tuple[Request | None, int]:
        """A beam shares most with the running one whose tokens are most like its own."""
        if req.search is None:
            return super().shared_with(req)
        nearest, most = None, 0
        for other in self._searches[req.search]:
            if other in self.decoding or other in self.holding:
                num = min(_num_common(other, req), other.num_computed_tokens, req.num_tokens - 1)
                if num > most:
                    nearest, most = other, num
        return nearest, most

    def _others_run(self, req: Request) -> bool:
        running = (*self.prefilling, *self.decoding, *self.holding, *self.loading)
        return any(not self.are_one(req, other) for other in running)

    # ---- the queue

    def head(self) -> Request | None:
        return self.first_to_join(super().head())

    def enqueue(self, req: Request) -> None:
        """Put `req` in its place in the queue."""
        if not self.joins(req):
            super().enqueue(req)

    def dequeue(self, req: Request) -> None:
        """Take `req` out of the queue."""
        if not self.joins_no_more(req):
            super().dequeue(req)

    def first_to_join(self, waiting: Request | None) -> Request | None:
        """The beam that others wait for, before `waiting` unless that is more urgent.

        So the best-ranked search that runs gets on: nobody is let in before its beams, and whoever else runs makes room
        for them.
        """
        beam = self._joining.peek()
        if beam is None or (waiting is not None and self.is_more_urgent(waiting, beam)):
            return waiting
        return beam

    def is_more_urgent(self, req: Request, beam: Request) -> bool:  # noqa: ARG002
        """Whether `req` is let in before a beam that others wait for."""
        return False

    def joins(self, req: Request) -> bool:
        """Queue a beam that others wait for. False: it is no such one."""
        if req.search is None:
            return False
        if not any(beam.status is RequestStatus.RUNNING for beam in self._searches[req.search]):
            return False
        self._joining.push(req, self._search_rank(req))
        return True

    def joins_no_more(self, req: Request) -> bool:
        """Take a beam that others wait for out of the queue. False: it is no such one."""
        if req not in self._joining:
            return False
        self._joining.remove(req)
        return True

    def _search_rank(self, beam: Request) -> Any:
        return self.rank(self._searches[beam.search][0])

    # ---- preempted, ended

    def are_one(self, req: Request, other: Request) -> bool:
        return req is other or (req.search is not None and req.search is other.search)

    def preempt(self, req: Request, plan: StepPlan) -> None:
        """Take a running request's slots away and queue it again; a beam's with those of all others."""
        if req.search is None:
            super().preempt(req, plan)
            return
        req.search.forget_round()
        first, *others = beams = self._searches[req.search]
        waiting = self._children.pop(first, [])
        # What a window slid past of a beam that holds, its last position needs again: no use in keeping the rest.
        may_swap = self.allocator.sliding_window is None or first not in self.holding
        for beam in beams:
            if beam in self.holding:  # its last position is to be computed again: that is how its token is drawn
                self._num_lost[beam] = max(self._num_lost.get(beam, 0), beam.num_computed_tokens)
                beam.num_computed_tokens = beam.num_tokens - 1
            if beam.status is RequestStatus.RUNNING:
                self.take_away(beam, plan, may_swap=may_swap and beam is first)
            elif beam not in waiting:
                self.dequeue(beam)
        self._children[first] = others
        self.enqueue(first)

    def finish(self, req: Request, reason: FinishReason, error: str = "") -> None:
        """End `req` wherever it is, and with a beam all others of its search."""
        super().finish(req, reason, error)
        if req.search not in self._searches:
            return
        for beam in self._searches[req.search]:
            if not beam.is_finished:
                super().finish(beam, reason, error)
        del self._searches[req.search]

    def yield_to_others(self, plan: StepPlan) -> bool:
        """Nobody gets on, as all that run wait for beams that find no room: preempt one search. False: it is not so."""
        if not (self.is_idle and self.holding):
            return False
        self.preempt(self.pick_victim(), plan)
        return True

    # ---- a round

    def move_beams(self, plan: StepPlan) -> list[Request]:
        """Take in which beams a step drew for, and move those of which all are drawn; the beams that ended."""
        drawn: dict[Any, None] = {}
        for (req, _, _), sampled in zip(plan.scheduled, plan.samples, strict=True):
            if sampled and req.search is not None and not req.is_finished:
                req.num_pending_tokens -= 1
                del self.decoding[req]
                self.holding[req] = None
                drawn[req.search] = None
        ended: list[Request] = []
        for search in drawn:
            if search.is_drawn:
                ended += self._move(self._searches[search])
        return ended

    def _move(self, beams: list[Request]) -> list[Request]:
        """End a round; the beams, if it was the last one."""
        search = beams[0].search
        assert search is not None
        moves = search.move([beam.output_token_ids for beam in beams])
        if search.is_over:
            for beam, text in zip(beams, search.winners, strict=True):
                beam.output_token_ids[:] = text.tokens
                super().finish(beam, FinishReason.STOP if text.is_stopped else FinishReason.LENGTH)
            del self._searches[search]
            return beams
        heirs = [
            (beam, beams[move.source])
            for beam, move in zip(beams, moves, strict=True)
            if beam is not beams[move.source]
        ]
        for heir, _ in heirs:  # all of them first: that makes room
            self.allocator.free(heir)
        for heir, source in heirs:
            heir.output_token_ids[:] = source.output_token_ids
        for beam, move in zip(beams, moves, strict=True):
            beam.output_token_ids.append(move.token)
            del self.holding[beam]
            self.decoding[beam] = None
        for heir, source in heirs:
            self._forked.append(heir)
            heir.num_computed_tokens = 0
            if not self.allocator.fork(source, heir, source.num_computed_tokens):
                del self.decoding[heir]
                heir.status = RequestStatus.WAITING
                heir.num_preemptions += 1  # what it had is gone, and it comes back
                self.enqueue(heir)
        return []

    def tell_forks(self, plan: StepPlan) -> None:
        """Put the heirs since the last step into `plan`."""
        plan.forked, self._forked = list(dict.fromkeys(self._forked)), []
        heirs = [beam for beam in plan.forked if beam.status is RequestStatus.RUNNING]
        plan.admitted = list(dict.fromkeys([*heirs, *plan.admitted]))


def _num_common(req: Request, other: Request) -> int:
    """Leading tokens that two beams of a search have in common."""
    num = req.num_prompt_tokens
    for one, two in zip(req.output_token_ids, other.output_token_ids, strict=False):
        if one != two:
            break
        num += 1
    return num
