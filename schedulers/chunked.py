"""Chunked prefill: decodes never wait for prompts (Sarathi-Serve, OSDI'24)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from kvarena.engine.contract import KVAllocator, StepPlan, StepTimes, cdiv, check_choice, is_number, require
from kvarena.engine.request import Request
from kvarena.schedulers.base import Scheduler

CHUNKS = ("budget", "timed")
# A step with a chunk takes at most so many times what its decodes alone take, while few prompts wait and while many do.
CALM, HURRIED = 1.5, 2.0
# Many: those that would take more steps than that.
QUEUE_STEPS = 32
# A step has at least so many prompt tokens, and a prompt is done after so many steps of its turn.
LEAST_CHUNK, TURN_STEPS = 128, 8


class ChunkedScheduler(Scheduler):
    """First come first served; every step decodes all that can, then takes prompt chunks.

    So a running request gets a token in every step. What bounds the step, and with it the time between tokens:

    `chunks=budget`: `max_num_batched_tokens`. A small budget bounds the time between tokens, a large one shortens the
    time to the first.

    `chunks=timed`: what the step takes, by `step_times`. While nobody decodes a step takes all waiting prompts, up to
    the budget. Beside decodes the chunk is the largest with which the step stays within `max_step_time`, or 1.5 times
    what the decodes alone take, whichever is longer; 2 times while more prompts wait than 32 such steps bring in. It is
    never below 128 tokens, or an eighth of the prompt whose turn it is: long prompts go on as well. Without step times
    the chunk is that least one.

    Args:
        allocator: who owns which slots.
        chunks: `budget` or `timed`.
        max_step_time: seconds that a step with decodes may take even if these alone take less; None: no such time.
        options: see `Scheduler`.

    Attributes:
        step_times: what steps take; None: nobody has said.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self, allocator: KVAllocator, *, chunks: str = "budget", max_step_time: float | None = None, **options: Any
    ) -> None:
        super().__init__(allocator, **options)
        self.chunks = check_choice("scheduler.chunks", chunks, CHUNKS)
        if max_step_time is not None:
            ok = is_number(max_step_time) and max_step_time > 0
            require(ok, "scheduler.max_step_time", max_step_time, "above 0 seconds, or null")
            require(chunks == "timed", "scheduler.max_step_time", max_step_time, "left out, or scheduler.chunks=timed")
        self.max_step_time = max_step_time
        self.step_times: StepTimes | None = None
        self._num_kv_saved = 0

    @property
    def wants_step_times(self) -> bool:
        return self.chunks == "timed" and self.step_times is None

    def set_step_times(self, times: StepTimes) -> None:
        self.step_times = times

    def note_saved(self, num_kv_tokens: int) -> None:
        self._num_kv_saved = num_kv_tokens

    def build_plan(self, plan: StepPlan, now: float) -> None:  # noqa: ARG002 - part of the hook
        """Decode, admit unless somebody was just preempted, prefill."""
        self.schedule_decodes(plan)
        budget = self.prompt_budget(plan)
        if not plan.preempted:
            self.admit_waiting(plan, budget)
        self.schedule_prefills(plan, budget)

    def prompt_budget(self, plan: StepPlan) -> int:
        """Most tokens of prompts beside the decodes that `plan` holds."""
        room = super().prompt_budget(plan)
        if self.chunks == "budget" or not plan.scheduled:
            return room
        prompts = list(self.order_prefills())
        turn = prompts[0] if prompts else self.head()
        if turn is None:
            return room
        num_tokens = turn.num_tokens - turn.num_cached_tokens
        least = max(LEAST_CHUNK, cdiv(num_tokens, TURN_STEPS))
        if self.step_times is None:
            return min(room, least)
        load = _Decodes(self.step_times, plan, prompts, turn, self._num_kv_saved)
        shortest = self.max_step_time or 0.0
        chunk = load.largest_chunk(max(shortest, CALM * load.seconds), room)
        waiting = sum(req.num_tokens - req.num_computed_tokens for req in prompts) + self._num_queued() * num_tokens
        if waiting > QUEUE_STEPS * max(chunk, least):
            chunk = load.largest_chunk(max(shortest, HURRIED * load.seconds), room)
        return min(room, max(chunk, least))

    def _num_queued(self) -> int:
        """Requests in the queue; children that wait for their parent's prompt have little to compute."""
        return self.num_waiting - sum(map(len, self._children.values()))


class _Decodes:
    """The decodes of a step, and what a chunk beside them takes.

    Args:
        times: what steps take.
        plan: has the decodes.
        prompts: admitted ones, in the order in which they get tokens.
        turn: whose turn it is; whoever comes after `prompts` is taken to be as long.
        num_saved: tokens that they need not read, because others of them do: as many as in the step before.
    """

    def __init__(
        self, times: StepTimes, plan: StepPlan, prompts: Iterable[Request], turn: Request, num_saved: int = 0
    ) -> None:
        self._times = times
        self._num_rows = len(plan.scheduled)
        self._num_kv_tokens = max(sum([start for _, start, _ in plan.scheduled]) + self._num_rows - num_saved, 0)
        self._prompts = [(req.num_computed_tokens, req.num_tokens) for req in prompts]
        self._length = turn.num_tokens
        self.seconds = times.decode(self._num_rows, self._num_kv_tokens)

    def largest_chunk(self, seconds: float, most: int) -> int:
        """Most prompt tokens with which the step stays within `seconds`, at most `most`."""
        fits, beyond = 0, most + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self.step_seconds(middle) <= seconds:
                fits = middle
            else:
                beyond = middle
        return fits

    def step_seconds(self, chunk: int) -> float:
        """Seconds of the step with so many prompt tokens."""
        left, pairs = chunk, 0.0
        queued = ((0, self._length) for _ in range(cdiv(chunk, self._length)))
        for start, end in chain(self._prompts, queued):
            take = min(left, end - start)
            pairs += take * (start + (take + 1) / 2)
            left -= take
            if not left:
                break
        return self._times.step(self._num_rows + chunk, self._num_kv_tokens, pairs)
