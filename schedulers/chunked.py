"""Chunked prefill: decodes never wait for prompts (Sarathi-Serve, OSDI'24)."""

from __future__ import annotations

from kvarena.engine.contract import StepPlan
from kvarena.schedulers.base import Scheduler


class ChunkedScheduler(Scheduler):
    """First come first served; every step decodes all that can, then fills the token budget with prompt chunks.

    So a running request gets a token in every step, and no step is longer than `max_num_batched_tokens` make it.
    A small budget bounds the time between tokens, a large one shortens the time to the first. Options: see
    `Scheduler`.
    """

    def build_plan(self, plan: StepPlan, now: float) -> None:  # noqa: ARG002 - part of the hook
        """Decode, admit unless somebody was just preempted, prefill."""
        self.schedule_decodes(plan)
        if not plan.preempted:
            self.admit_waiting(plan)
        self.schedule_prefills(plan)
