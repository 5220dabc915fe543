"""The step loop.

    plain:     schedule N | execute N ........ | update N | schedule N+1 | ...
    overlap:   schedule N | launch N | update N-1 | schedule N+1 | launch N+1 | update N | ...

With overlap the host plans step N+1 while the device computes N: the request's token of step N is then *pending*
(`Request.num_pending_tokens`), and a request that ends by a stop token has computed one token too many, which is
dropped. Overlap never changes tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, KVUsage, LevelUsage, StepPlan, StepScheduler
from kvarena.engine.errors import EngineError, KvarenaError
from kvarena.engine.ledger import Ledger
from kvarena.engine.model_runner import ModelRunner, PendingTokens, StepResult
from kvarena.engine.request import Request


@dataclass(slots=True)
class StepOutput:
    """One step, for whoever records or streams it. Times in seconds on the engine's clock.

    Attributes:
        index: number of the step, from 0.
        plan: what was computed.
        result: the step's tokens, aligned with `plan.scheduled`.
        finished: requests that ended with this step; `plan.rejected` ended before it.
        usage: the ledger's raw counts during the step: slots allocated, nothing freed yet.
        levels: the books of the levels below the pool, then.
        num_running: requests running during the step.
        num_waiting: requests waiting during the step.
        start_time: when scheduling began.
        launch_time: when the plan was ready.
        launched_time: when the runner's call had returned: the device has all of the step.
        end_time: when its tokens were on the host.
        wait_time: seconds that the host waited for them.
    """

    index: int
    plan: StepPlan
    result: StepResult
    finished: list[Request]
    usage: KVUsage
    num_running: int
    num_waiting: int
    start_time: float
    launch_time: float
    launched_time: float
    end_time: float
    wait_time: float = 0.0
    levels: Sequence[LevelUsage] = ()


@dataclass(slots=True)
class _InFlight:
    """A launched step whose tokens are not back yet. `constrained`: they decide what the next may be, or who has it."""

    output: StepOutput
    pending: PendingTokens
    constrained: bool


class StepFailed(EngineError):
    """The runner could not execute a step. `plan` is the step; the cause is chained."""

    def __init__(self, plan: StepPlan, cause: Exception) -> None:
        reason = str(cause) if isinstance(cause, KvarenaError) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"a step of {len(plan.scheduled)} requests failed: {reason}")
        self.plan = plan


@dataclass
class Engine:
    """Drives one scheduler, allocator and runner. Not thread-safe: one caller steps it.

    Args:
        scheduler: who runs next; it was given the same `allocator`.
        allocator: who owns which slots.
        runner: computes the steps.
        clock: the only source of time.
        overlap: plan step N+1 while step N runs.
        ledger: accounts for every slot of every step; that of a run fails it if a step does not add up.
        on_launch: told of every step while its slots are allocated and none is freed; `result` and `finished` are not
            known yet.
    """

    scheduler: StepScheduler
    allocator: KVAllocator
    runner: ModelRunner
    clock: Clock
    overlap: bool = False
    ledger: Ledger | None = None
    on_launch: Callable[[StepOutput], None] | None = None
    num_steps: int = 0
    _in_flight: _InFlight | None = field(default=None, repr=False)
    _deciders_seen: bool = field(default=False, repr=False)
    _num_kv_saved: int = field(default=0, repr=False)

    @property
    def has_work(self) -> bool:
        """True while a request waits, runs, or is in flight."""
        return self.scheduler.has_work or self._in_flight is not None

    @property
    def in_flight(self) -> bool:
        """True while a launched step's tokens are outstanding (only with overlap)."""
        return self._in_flight is not None

    def add(self, req: Request) -> None:
        """Queue a request. Raises RequestRejected when it can never run here."""
        self.scheduler.add(req)
        self._deciders_seen = self._deciders_seen or req.constraint is not None or req.search is not None

    def abort(self, request_id: str) -> Request | None:
        """End a request; its slots are free before the next step is planned."""
        req = self.scheduler.abort(request_id)
        if req is not None:  # one beam's end is all of theirs
            self.runner.release([request_id] if req.search is None else list(req.search.request_ids))
        return req

    def step(self) -> StepOutput | None:
        """Run one step. None when there was nothing to compute (see `wake_time`).

        Under overlap the returned step is the one launched by the *previous* call.

        Raises:
            StepFailed: the runner failed. The requests of `plan` must be ended (`StepScheduler.fail`); the engine
                can then go on, unless the device is lost.
            EngineError: the ledger does not add up.
        """
        if self._in_flight is not None and self._in_flight.constrained:
            # The next step's tokens hang on this one's: no overlap here.
            return self.settle()
        start = self.clock.now()
        if self.allocator.is_moving:
            arrived = self.allocator.arrive(start)
            if arrived:
                self.scheduler.loaded(arrived)
        plan = self.scheduler.schedule(start)
        launched = self._launch(plan, start) if plan.scheduled or plan.rejected or plan.copies else None
        if not self.overlap:
            return self._finish(launched) if launched else None
        previous, self._in_flight = self._in_flight, launched
        return self._finish(previous) if previous else None

    def wake_time(self, now: float) -> float | None:
        """When an empty plan may turn into work: a batch's time, or blocks that come up; None: with an arrival."""
        times = (self.scheduler.wake_time(now), self.allocator.next_arrival())
        return min((time for time in times if time is not None), default=None)

    def settle(self) -> StepOutput | None:
        """Take in the tokens of the step that is in flight, and plan none; None without one. Raises as `step` does."""
        previous, self._in_flight = self._in_flight, None
        return self._finish(previous) if previous else None

    def _launch(self, plan: StepPlan, start: float) -> _InFlight:
        usage, levels = self.allocator.usage(self.scheduler.queue_head()), self.allocator.levels
        if self.ledger is not None:
            self.ledger.observe(plan, usage)
            if levels:
                self.ledger.observe_levels(levels)
        output = StepOutput(
            index=self.num_steps,
            plan=plan,
            result=StepResult([]),
            finished=[],
            usage=usage,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            start_time=start,
            launch_time=self.clock.now(),
            launched_time=start,
            end_time=start,
            levels=levels,
        )
        self.num_steps += 1
        if self.on_launch is not None:
            self.on_launch(output)
        try:
            pending = self.runner.execute(plan, self.allocator)
        except Exception as error:
            raise StepFailed(plan, error) from error
        output.launched_time = self.clock.now()
        constrained = self._deciders_seen and any(
            req.constraint is not None or req.search is not None for req, _, _ in plan.scheduled
        )
        return _InFlight(output, pending, constrained)

    def _finish(self, step: _InFlight) -> StepOutput:
        output = step.output
        asked = self.clock.now()
        try:
            output.result = step.pending.result()
        except Exception as error:
            raise StepFailed(output.plan, error) from error
        output.end_time = self.clock.now()
        output.wait_time = output.end_time - asked
        tokens: Sequence[int | None] = output.result.token_ids
        if step.constrained:
            self._follow_constraints(output.plan, output.result)
            tokens = self._draw_beams(output.plan, output.result)
        if output.result.num_kv_saved != self._num_kv_saved:
            self._num_kv_saved = output.result.num_kv_saved
            self.scheduler.note_saved(self._num_kv_saved)
        output.finished = self.scheduler.update(output.plan, tokens)
        ended = [req.request_id for req in (*output.finished, *output.plan.rejected)]
        if ended:
            self.runner.release(ended)
        return output

    def _follow_constraints(self, plan: StepPlan, result: StepResult) -> None:
        """Tell constraints their tokens; a token that was sampled without its mask is void, and sampled again."""
        for i, ((req, _, _), token) in enumerate(zip(plan.scheduled, result.token_ids, strict=True)):
            if token is None or req.constraint is None or req.is_finished:
                continue
            if not req.constraint.num_late:
                req.constraint.accept(token)
                continue
            result.token_ids[i] = None
            if result.logprobs is not None:
                result.logprobs[i] = None
            self.scheduler.take_back(req)

    @staticmethod
    def _draw_beams(plan: StepPlan, result: StepResult) -> list[int | None]:
        """Give searches what their beams drew; the tokens of all others."""
        tokens = list(result.token_ids)
        for i, ((req, _, _), token) in enumerate(zip(plan.scheduled, result.token_ids, strict=True)):
            if token is None or req.search is None:
                continue
            tokens[i] = None
            entry = None if result.logprobs is None else result.logprobs[i]
            if entry is None:
                text = f"beam {req.request_id!r} needs log-probabilities, and this runner gives none"
                raise StepFailed(plan, EngineError(text))
            if not req.is_finished:
                req.search.draw(req.beam, entry)
        return tokens


def run_to_completion(engine: Engine, requests: Sequence[Request]) -> list[StepOutput]:
    """Add `requests` at once and step until all have ended. For tests and small scripts."""
    for req in requests:
        engine.add(req)
    outputs = []
    while engine.has_work:
        output = engine.step()
        if output is not None:
            outputs.append(output)
            continue
        if engine.has_work and not engine.in_flight:
            wake = engine.wake_time(engine.clock.now())
            if wake is None:
                raise EngineError("the scheduler has requests and plans nothing: no progress is possible")
            engine.clock.sleep_until(wake)
    return outputs
