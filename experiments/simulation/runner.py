"""A runner without a device: a step-time model says how long each step takes, and a virtual clock moves on.

Schedulers and allocators are the real objects and cannot tell the difference. Steps follow each other on one
simulated device: under overlap a step that is launched while another one runs begins when that one ends. Free of
torch.
"""

from __future__ import annotations

from kvarena.engine.clock import Clock, MovableClock, VirtualClock
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.core import StepOutput
from kvarena.engine.model_runner import StepResult, TokenLogprobs
from kvarena.experiments.recording.step_features import step_features
from kvarena.experiments.simulation.request_reads import RequestReads
from kvarena.experiments.simulation.step_time import HostTime, StepTime
from kvarena.experiments.workloads.parts.beam_scores import BeamScores
from kvarena.reports.analysis.experts import ExpertLoad


class SimulatedRunner:
    """Answers every step with `token_id`, at the time that the step-time model gives.

    Args:
        step_time: seconds of the device for a step, from its features.
        clock: the engine's; only this runner and the driver move it.
        token_id: the token that every sample gets; must not end requests that are to run to their length.
        host: seconds of the host around a step. The part after a step passes when the driver calls `after_step`.
        experts: of the model; each step then says how many it reads, as expected. None for a dense one.
        shares: decodes read once what they have in common.
        beam_scores: what beams draw; None: as many tokens from `token_id` on as they need.
    """

    def __init__(
        self,
        step_time: StepTime,
        clock: MovableClock,
        token_id: int = 0,
        host: HostTime | None = None,
        experts: ExpertLoad | None = None,
        shares: bool = False,
        beam_scores: BeamScores | None = None,
    ) -> None:
        self._reads = RequestReads() if shares else None
        self._beam_scores = beam_scores
        self._step_time = step_time
        self._clock = clock
        self._token_id = token_id
        self._host = host or HostTime()
        self._experts = experts
        self._free_at = 0.0  # when the device has run all that was launched

    def twin(self) -> tuple[SimulatedRunner, VirtualClock]:
        """A device of the same kind that nobody uses, on a clock of its own."""
        clock = VirtualClock()
        shares = self._reads is not None
        made = SimulatedRunner(
            self._step_time, clock, self._token_id, self._host, self._experts, shares, self._beam_scores
        )
        return made, clock

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> SimulatedStep:
        """Launch a step, after the host's part before it.

        The device begins with the first kernel: of a graph when it is launched, else when the launch begins. Then it
        cannot end before the last one is launched.
        """
        arrive_in_order(plan.copies)  # the step waits for them, as it does for swaps
        num_saved = 0 if self._reads is None else self._reads.of_plan(plan, allocator)
        host, clock, features = self._host, self._clock, step_features(plan, num_saved=num_saved)
        before = host.before + host.before_per_request * len(plan.scheduled)
        clock.advance(before + (host.before_prefill if features.num_prefill_requests else 0.0))
        first_kernel = clock.now()
        clock.advance(host.launch(features))
        launched = clock.now()
        seconds = self._step_time(features)
        if host.replays(features):
            self._free_at = max(launched, self._free_at) + seconds
        else:
            self._free_at = max(max(first_kernel, self._free_at) + seconds, launched + host.tail)
        token_id = self._token_id
        tokens = [token_id if sample else None for sample in plan.samples]
        experts = self._experts
        num_read = 0.0 if experts is None else experts.num_layers * experts.read(features.num_tokens)
        return SimulatedStep(tokens, self._free_at, self._clock, host.take, num_read, num_saved, self._drawn(plan))

    def _drawn(self, plan: StepPlan) -> list[TokenLogprobs | None] | None:
        """What the step's beams draw from; None without any."""
        if not any(entry.req.search is not None for entry in plan.scheduled):
            return None
        if self._beam_scores is None:
            self._beam_scores = BeamScores(range(self._token_id, self._token_id + 256))
        best = self._beam_scores.best
        return [
            best(entry.req) if sample and entry.req.search is not None else None
            for entry, sample in zip(plan.scheduled, plan.samples, strict=True)
        ]

    def after_step(self, step: StepOutput) -> None:
        """The host's part after a step: what it took to update and to record."""
        host, plan = self._host, step.plan
        prompts = host.after_prefill if len(plan.scheduled) > plan.num_decodes else 0.0
        self._clock.advance(host.after + host.after_per_request * len(plan.scheduled) + prompts)

    def release(self, request_ids: list[str]) -> None:
        """Forget what requests that ended read."""
        if self._reads is not None:
            self._reads.release(request_ids)


class SimulatedStep:
    """A step on the simulated device."""

    __slots__ = ("_clock", "_end_time", "_logprobs", "_num_experts_read", "_num_saved", "_take", "_token_ids")

    def __init__(
        self,
        token_ids: list[int | None],
        end_time: float,
        clock: Clock,
        take: float = 0.0,
        num_experts_read: float = 0.0,
        num_saved: int = 0,
        logprobs: list[TokenLogprobs | None] | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._logprobs = logprobs
        self._end_time = end_time
        self._clock = clock
        self._take = take
        self._num_experts_read = num_experts_read
        self._num_saved = num_saved

    def result(self) -> StepResult:
        """Move the clock to the end of the step, or by what it takes to take in what waits, and return the tokens."""
        self._clock.sleep_until(max(self._end_time, self._clock.now() + self._take))
        return StepResult(
            self._token_ids, self._logprobs, num_experts_read=self._num_experts_read, num_kv_saved=self._num_saved
        )
