"""Request-level scheduling: a batch runs to its end before the next one starts (FasterTransformer, Triton)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarena.engine.contract import KVAllocator, StepPlan, check_choice, check_int, is_number, require
from kvarena.engine.request import FinishReason, Request
from kvarena.schedulers.base import Scheduler

RETIRE = ("hold", "free")


class StaticScheduler(Scheduler):
    """Forms a batch, runs it to its end, forms the next.

    A batch forms when `batch_size` requests wait, or `max_wait` seconds after the arrival of the first that waits.
    It takes as many as fit, in order of arrival. Every request reserves prompt + max_tokens when its batch starts,
    with any allocator, so nobody is preempted. All prompts of a batch are computed before the first decode, in
    chunks of the token budget. Parallel samples are requests like any other: they do not share their prompt's KV.

    Args:
        allocator: who owns which slots.
        max_num_seqs: most requests in a batch.
        retire: what the literature leaves open. `hold`: a finished request keeps its slots until its batch has
            ended; `free`: it gives them back at once. Either way nobody is admitted before the batch has ended.
        batch_size: requests that start a batch without a wait; None: `max_num_seqs`.
        max_wait: seconds after which a smaller batch starts; 0 starts with whatever waits.
        options: `max_model_len`, `max_num_batched_tokens`, `max_num_batched_tiles` and `watermark`, see `Scheduler`.
            The watermark keeps the same share of the pool free as under the others; no request of this scheduler ever
            grows.

    Raises:
        ConfigError: an option out of range.
    """

    shares_prompts = False

    def __init__(
        self,
        allocator: KVAllocator,
        *,
        max_num_seqs: int = 256,
        retire: str = "hold",
        batch_size: int | None = None,
        max_wait: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(allocator, max_num_seqs=max_num_seqs, preemption="none", **options)
        check_choice("scheduler.retire", retire, RETIRE)
        if batch_size is not None:
            check_int("scheduler.batch_size", batch_size, 1, max_num_seqs)
        require(is_number(max_wait) and max_wait >= 0, "scheduler.max_wait", max_wait, "at least 0 seconds")
        self.batch_size = min(self.max_num_seqs, batch_size or max_num_seqs)
        self.max_wait = max_wait
        self._hold = retire == "hold"
        self._held: list[Request] = []

    def build_plan(self, plan: StepPlan, now: float) -> None:
        """Start the next batch when the last has ended; run the batch."""
        due = self.wake_time(now)
        if due is not None and (self.num_waiting >= self.batch_size or now >= due):
            self._form_batch(plan)
        self.schedule_prefill_first(plan)

    def wake_time(self, now: float) -> float | None:  # noqa: ARG002 - part of the protocol
        """When the batch that is filling starts at the latest; None while one runs, or nobody waits."""
        head = self.head()
        return None if self.num_running or head is None else head.arrival_time + self.max_wait

    @property
    def held(self) -> Sequence[Request]:
        """Those that wait for the end of their batch."""
        return self._held

    def retire(self, req: Request) -> None:
        """Free, or hold until the last request of the batch has ended. Aborted ones never hold."""
        ran_to_its_end = req.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if self._hold and ran_to_its_end:
            self._held.append(req)
        else:
            self.allocator.free(req)
        if self.num_running == 0:
            for held in self._held:
                self.allocator.free(held)
            self._held.clear()

    def _form_batch(self, plan: StepPlan) -> None:
        while self.num_running < self.batch_size:
            req = self.head()
            if req is None or not (self.admit(req, plan) or req.is_finished):
                return
