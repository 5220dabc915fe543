"""What all schedulers share; a policy overrides `build_plan` and a few small hooks.

A request that runs is in exactly one of two sets (in neither: a beam that waits for others, `beams.py`, and a request
whose blocks come up from a level below the pool, `loading`).
`prefilling`: more than the last sampled token is left to compute (a prompt, or what a preemption dropped). `decoding`:
each step computes one token and samples one, so the loop over it needs no arithmetic on lengths; that loop is what a
step costs.

Progress. A request is admitted only with slots for all tokens that it has, so its next step samples. The running
request of the best `rank` is never preempted while another one runs, ranks never change, and the allocator refuses
it only when it is alone; a request that does not fit into an empty pool ends with an error. So some request always
gets on, and no two can wait for each other. Beams that wait for one another count as one (`beams.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from kvarena.engine.contract import QueueHead, ScheduledRequest, StepPlan
from kvarena.engine.errors import RequestError, RequestRejected
from kvarena.engine.request import FinishReason, Request, RequestStatus
from kvarena.schedulers.beams import BeamLifecycle


class Scheduler(BeamLifecycle):
    """Base of all schedulers: what the engine asks, and the loops that policies build their plans from.

    Args:
        allocator: who owns which slots.
        max_model_len: most tokens of one request, prompt and output.
        max_num_seqs: most requests that run at once; never more than `max_num_batched_tokens`, so that all that run
            can decode in one step.
        max_num_batched_tokens: most new tokens in one step.
        max_num_batched_tiles: most tiles of images among them, a large one counting as several: the vision tower's
            share of a step is bounded, but for one tile that alone weighs more.
        watermark: share of the pool that admission keeps free for the growth of those that run, in [0, 1). Nobody
            is kept out by it while nothing runs.
        preemption: `recompute` drops a victim's KV; `swap` moves it to host memory where the allocator can, else
            drops it; `none` reserves prompt + max_tokens at admission, so that nobody is ever preempted.
        victim: who is preempted: `last_arrived`, `lowest_priority` or `most_blocks`.

    Attributes:
        requests: all that have not ended, by id.
        prefilling: running, not yet computed up to the last token; by admission.
        decoding: running, one token a step; by admission.
        holding: beams whose token of this round is drawn, while another one's is not.
        loading: admitted, and some of its tokens are on their way up from a level below the pool.

    Raises:
        ConfigError: an option out of range.
    """

    # ---- policy

    @abstractmethod
    def build_plan(self, plan: StepPlan, now: float) -> None:
        """Fill `plan` from `prefilling`, `decoding` and the queue, with the `schedule_*` and `admit*` methods."""

    # ---- what the engine asks

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - self.num_running

    def queue_head(self) -> QueueHead | None:
        req = self.head()
        if req is None:
            return None
        return QueueHead(req, self.num_slots_to_admit(req), *self.shared_with(req))

    def add(self, req: Request) -> None:
        if req.request_id in self.requests:
            raise RequestError(f"request id {req.request_id!r} is in use; give each request its own", "request_id")
        total, limit, room = req.max_total_tokens, self.max_model_len, self.allocator.max_request_tokens
        size = f"request {req.request_id!r}: prompt {req.num_prompt_tokens} + max_tokens {req.sampling.max_tokens}"
        if total > limit:
            raise RequestRejected(
                f"{size} is over engine.max_model_len={limit}; shorten the prompt, lower max_tokens, "
                "or raise it as far as the model goes",
                reason="max_model_len",
            )
        if total > room:
            raise RequestRejected(
                f"{size} is over the {room} tokens that the empty KV pool can hold; shorten the request or raise "
                "kv_cache.num_blocks",
                reason="max_request_tokens",
            )
        if req.search is not None:
            self.check_search(req.search.width)
            self.add_beam(req)
        self.requests[req.request_id] = req
        self.arrival[req] = next(self._arrivals)
        parent = req.parent
        if self.shares_prompts and parent and parent.request_id in self.requests and parent not in self.decoding:
            self._children.setdefault(parent, []).append(req)
        else:
            self.enqueue(req)

    def abort(self, request_id: str) -> Request | None:
        req = self.requests.get(request_id)
        if req is not None:
            self.finish(req, FinishReason.ABORT)
        return req

    def fail(self, plan: StepPlan) -> list[Request]:
        """End every request of a step that the runner could not execute.

        Whose KV the step's copies carried computes it again: nobody knows which of them were made.
        """
        failed = [entry.req for entry in plan.scheduled if not entry.req.is_finished]
        gone = {req.search for req in failed if req.search is not None}
        failed += [beam for search in gone for beam in self._searches[search] if beam not in failed]
        for req in failed:
            if not req.is_finished:
                self.finish(req, FinishReason.ERROR, "the device failed while it computed this request")
        if plan.copies:
            for req in plan.preempted:
                if req.status is RequestStatus.SWAPPED:
                    self._drop(req)
            # Admitted, and perhaps swapped in, by this step; or forked before it.
            for req in [*self.prefilling, *(beam for beam in plan.forked if beam in self.decoding)]:
                self._remove_running(req)
                self._drop(req)
                self.enqueue(req)
            for req in self.allocator.abandon(plan.copies):
                if req in self.loading:
                    self._remove_running(req)
                    self._drop(req)
                    self.enqueue(req)
        return failed

    def schedule(self, now: float) -> StepPlan:
        plan = StepPlan()
        self.build_plan(plan, now)
        if plan.preempted and not plan.scheduled:
            # The last one that ran gave its slots back: the pool is empty, and somebody can be admitted at once.
            plan = self._planned_again(plan, now)
        while not plan.scheduled and self.yield_to_others(plan):
            plan = self._planned_again(plan, now)
        plan.copies = self.allocator.drain_copies()
        if self._forked and (plan.scheduled or plan.copies or plan.rejected):
            self.tell_forks(plan)
        if self._unreported or plan.preempted:
            preempted = list(dict.fromkeys(self._unreported + plan.preempted))
            launched = plan.scheduled or plan.copies or plan.rejected
            plan.preempted, self._unreported = (preempted, []) if launched else ([], preempted)
            # Whoever was admitted and lost its slots again in this very step owns nothing in it.
            plan.admitted = [req for req in dict.fromkeys(plan.admitted) if req.status is RequestStatus.RUNNING]
        return plan

    def _planned_again(self, plan: StepPlan, now: float) -> StepPlan:
        """Another plan, as `plan` computes nothing and took slots away."""
        self._unreported += plan.preempted
        plan = StepPlan(admitted=plan.admitted, rejected=plan.rejected)
        self.build_plan(plan, now)
        return plan

    def update(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[Request]:
        finished: list[tuple[Request, FinishReason]] = []
        commit = self.allocator.commit if self.allocator.commits else None
        running, ended = RequestStatus.RUNNING, RequestStatus.FINISHED
        for (req, _, _), token in zip(plan.scheduled, sampled, strict=True):
            status = req.status
            if status is ended:  # aborted, or ended by the step before, while this one was in flight
                continue
            if token is not None:
                req.num_pending_tokens -= 1
                output = req.output_token_ids
                output.append(token)
                if token in req.stop_ids or len(output) >= req.sampling.max_tokens:
                    reason = req.stop_reason()
                    if reason is not None:
                        finished.append((req, reason))
            if commit is not None and status is running:  # else it was preempted while the step was in flight
                commit(req)
        for req, reason in finished:
            self.finish(req, reason)
        gone = [req for req, _ in finished]
        return gone + self.move_beams(plan) if self._searches else gone

    def take_back(self, req: Request) -> None:
        req.num_pending_tokens -= 1
        req.num_computed_tokens -= 1

    # ---- what plans are built from

    def schedule_decodes(self, plan: StepPlan) -> None:
        """Schedule one token of every request in `decoding`, preempting where the pool runs dry."""
        schedule, sample = plan.scheduled.append, plan.samples.append
        preempted, decoding = plan.preempted, self.decoding
        make = tuple.__new__  # a third of the cost of ScheduledRequest(...)
        for req in list(decoding):
            if preempted and req not in decoding:
                continue
            start = req.num_computed_tokens
            pending = req.num_pending_tokens
            if pending and len(req.output_token_ids) + pending >= req.sampling.max_tokens:
                continue  # its last token is on the device already
            if start >= req.num_slots and not self.grow(req, start + 1, plan):
                continue
            req.num_computed_tokens = start + 1
            req.num_pending_tokens = pending + 1
            schedule(make(ScheduledRequest, (req, start, 1)))
            sample(True)
        plan.num_decodes = len(plan.scheduled)

    def prompt_budget(self, plan: StepPlan) -> int:
        """Most tokens of prompts beside what `plan` holds: what that left of the token budget."""
        return self.max_num_batched_tokens - len(plan.scheduled)

    def schedule_prefills(self, plan: StepPlan, budget: int | None = None) -> None:
        """Schedule chunks of the requests in `prefilling`, in order.

        Comes last in a step: all that `plan` holds before are decodes of one token.

        Args:
            plan: the step.
            budget: most new tokens in them; None: `prompt_budget`.
        """
        budget = self.prompt_budget(plan) if budget is None else budget
        tiles = most_tiles = self.max_num_batched_tiles
        for req in self.order_prefills():
            if budget <= 0:
                return
            if req not in self.prefilling:  # preempted in this loop
                continue
            start, total = req.num_computed_tokens, req.num_tokens
            end = min(total, start + budget)
            num_tiles = 0
            if req.images:
                end, num_tiles = req.within_tiles(start, end, tiles, is_first=tiles == most_tiles)
                if end == start:
                    continue
            if end > req.num_slots and not self.grow(req, end, plan):
                continue
            budget -= end - start
            tiles -= num_tiles
            req.num_computed_tokens = end
            req.num_recomputed_tokens += self._recomputed(req, start, end)
            plan.scheduled.append(ScheduledRequest(req, start, end - start))
            plan.samples.append(end == total)
            if end == total:
                req.num_pending_tokens += 1
                del self.prefilling[req]
                self.decoding[req] = None
                self._release_children(req)

    def order_prefills(self) -> Iterable[Request]:
        """Requests of `prefilling` in the order in which they get the token budget; by admission."""
        return list(self.prefilling)

    def schedule_prefill_first(self, plan: StepPlan) -> None:
        """Prefills alone while there are any, else decodes: a step is one or the other.

        One token left (swapped in, forked, a prefix hit on all but the last token) counts as a decode.
        """
        if all(req.num_tokens - req.num_computed_tokens == 1 for req in self.prefilling):
            self.schedule_decodes(plan)
        self.schedule_prefills(plan)

    def admit_waiting(self, plan: StepPlan, budget: int | None = None) -> None:
        """Admit from the queue until slots, sequences or the step's token budget run out.

        Comes after `schedule_decodes` and before `schedule_prefills`, and has the same budget.
        """
        budget = self.prompt_budget(plan) if budget is None else budget
        budget -= sum(req.num_tokens - req.num_computed_tokens for req in self.prefilling)
        while budget > 0 and self.num_running < self.max_num_seqs:
            req = self.head()
            if req is None or not self.has_seat(req):
                return
            if self.admit(req, plan):
                budget -= req.num_tokens - req.num_computed_tokens if req in self.prefilling else 0
            elif not req.is_finished:
                return
