"""Strict priorities with preemption, over chunked prefill."""

from __future__ import annotations

from collections.abc import Iterable

from kvarena.engine.contract import StepPlan
from kvarena.engine.request import Request
from kvarena.schedulers.chunked import ChunkedScheduler


class PriorityScheduler(ChunkedScheduler):
    """The lowest `Request.priority` first; first come first served among equals.

    A waiting request takes the slots of running ones with a larger number, if theirs and the free ones suffice; the
    most urgent prompts are also first to get the token budget. The less urgent may starve: that is what strict
    means. With `preemption=none` running requests keep their slots and only the queue is ordered. Options: see
    `Scheduler`; the victim policy picks within the least urgent priority that runs.
    """

    @property
    def has_priorities(self) -> bool:
        """They decide everything."""
        return True

    def build_plan(self, plan: StepPlan, now: float) -> None:
        """Make room for urgent requests, then go on as chunked prefill does."""
        if self.preemption != "none":
            self._preempt_for_urgent(plan)
        super().build_plan(plan, now)

    def rank(self, req: Request) -> tuple[int, int]:
        """Priority, then arrival."""
        return req.priority, self.arrival[req]

    def is_more_urgent(self, req: Request, beam: Request) -> bool:
        """By its priority alone."""
        return req.priority < beam.priority

    def order_prefills(self) -> Iterable[Request]:
        """The most urgent first."""
        return sorted(self.prefilling, key=self.rank)

    def worst(self, candidates: Iterable[Request]) -> Request:
        """The victim policy's choice within the least urgent priority."""
        candidates = list(candidates)
        last = max(req.priority for req in candidates)
        return super().worst(req for req in candidates if req.priority == last)

    def _preempt_for_urgent(self, plan: StepPlan) -> None:
        """Admit the head of the queue at the expense of less urgent requests, as long as that works."""
        made_room_for: Request | None = None
        while (head := self.head()) is not None and not head.num_pending_tokens:
            victims = [req for req in (*self.decoding, *self.prefilling, *self.holding) if req.priority > head.priority]
            full = not self.has_seat(head)
            if (victims or head is made_room_for) and not full and self.admit(head, plan):
                continue
            if not victims or not self._would_fit(head, victims):
                return
            self.preempt(self.worst(victims), plan)
            made_room_for = head

    def _would_fit(self, head: Request, victims: list[Request]) -> bool:
        """Whether the slots of `victims` and the free ones hold `head`: nobody is preempted in vain."""
        usage = self.allocator.usage()
        free = usage.total - usage.owned
        reserve = self._watermark_slots if len(victims) < self.num_running else 0
        return free + sum(req.num_slots for req in victims) - reserve >= self.num_slots_to_admit(head)
