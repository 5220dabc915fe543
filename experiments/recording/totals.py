"""The totals of a run of which nothing is recorded (`driver.record=none`): what throughput needs, and no more."""

from __future__ import annotations

from typing import Any

from kvarena.engine.core import StepOutput
from kvarena.engine.request import FinishReason, Request


class RunTotals:
    """Counts requests and tokens; a step without an end of a request costs an addition or two.

    Attributes:
        num_steps: steps taken in.
        num_finished: requests that ended, for whatever reason.
        num_output_tokens: of those requests.
        wall_time: end of the last step, in seconds since the run's start.
        max_lateness: how late a request was handed over at most, in seconds.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_finished = 0
        self.num_output_tokens = 0
        self.wall_time = 0.0
        self.max_lateness = 0.0
        self._num_requests = 0
        self._num_prompt_tokens = 0
        self._ended = dict.fromkeys(FinishReason, 0)
        self._prompt_tokens = dict.fromkeys(FinishReason, 0)
        self._output_tokens = dict.fromkeys(FinishReason, 0)
        self._first_arrival: float | None = None
        self._last_finish: float | None = None

    def on_submit(self, req: Request, now: float) -> None:
        """`req` was handed to the engine at `now`."""
        self._num_requests += 1
        self._num_prompt_tokens += req.num_prompt_tokens
        self.max_lateness = max(self.max_lateness, now - req.arrival_time)
        first = self._first_arrival
        self._first_arrival = req.arrival_time if first is None else min(first, req.arrival_time)

    def on_rejected(self, req: Request, now: float, error: str) -> None:  # noqa: ARG002 - a driver's Recorder
        """The engine refused `req`, which was handed over at `now`."""
        req.error = error
        req.finish_reason = FinishReason.REJECTED
        self._end(req)

    def on_step(self, step: StepOutput) -> None:
        """Take one finished step in."""
        self.num_steps += 1
        self.wall_time = step.end_time
        for req in step.finished:
            self._end(req)
            self._last_finish = step.end_time
        for req in step.plan.rejected:
            self._end(req)
            self._last_finish = step.start_time

    def interrupt(self, error: str) -> None:  # noqa: ARG002 - as a RunRecorder's
        """Nothing comes any more: the requests that have not ended are aborted."""
        self._ended[FinishReason.ABORT] += self.num_submitted - self.num_finished

    @property
    def num_submitted(self) -> int:
        """Requests that were handed over."""
        return self._num_requests

    def _end(self, req: Request) -> None:
        reason = req.finish_reason
        assert reason is not None
        self.num_finished += 1
        self.num_output_tokens += len(req.output_token_ids)
        self._ended[reason] += 1
        self._prompt_tokens[reason] += req.num_prompt_tokens
        self._output_tokens[reason] += len(req.output_token_ids)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the run in place of its files (`run.totals`, docs/files.md)."""
        by_itself = (FinishReason.STOP, FinishReason.LENGTH)
        started = self._first_arrival is not None and self._last_finish is not None
        return {
            "num_requests": self._num_requests,
            "num_finished": sum(self._ended[reason] for reason in by_itself),
            "num_rejected": self._ended[FinishReason.REJECTED],
            "num_aborted": self._ended[FinishReason.ABORT],
            "num_failed": self._ended[FinishReason.ERROR],
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "num_finished_prompt_tokens": sum(self._prompt_tokens[reason] for reason in by_itself),
            "num_finished_output_tokens": sum(self._output_tokens[reason] for reason in by_itself),
            "duration": self._last_finish - self._first_arrival if started else 0.0,  # type: ignore[operator]
        }
