"""Iteration-level scheduling, prefill first: Orca (OSDI'22), and vLLM before chunked prefill."""

from __future__ import annotations

from kvarena.engine.contract import StepPlan
from kvarena.schedulers.base import Scheduler


class ContinuousScheduler(Scheduler):
    """First come first served; a step computes prompts or decodes, never both.

    A request is admitted in the first step that has room for it, and every running request waits while prompts are
    computed: throughput first, at the price of the others' time between tokens (see `chunked`). Prompts longer
    than the token budget are computed in chunks over several steps. Options: see `Scheduler`.
    """

    def build_plan(self, plan: StepPlan, now: float) -> None:  # noqa: ARG002 - part of the hook
        """Admit, then prefill; decode when there is nothing to prefill."""
        self.admit_waiting(plan)
        self.schedule_prefill_first(plan)
