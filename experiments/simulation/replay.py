"""Replays a recorded run step for step: does the same strategy, given the recorded times, decide the same?

Nothing is computed and nothing is estimated: steps take the times that were recorded, requests are handed over before
the step before which they were handed over, and samples get the recorded tokens. What is compared is the decision hash
of every step (`kvarena.experiments.recording.decisions`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvarena.engine.clock import Clock, VirtualClock
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.errors import RequestRejected
from kvarena.engine.request import Request
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.runner import SimulatedStep


@dataclass(frozen=True)
class ReplayResult:
    """How far a replay followed its recording.

    Attributes:
        num_steps: recorded steps.
        num_identical: steps from the first on whose decisions were the same.
    """

    num_steps: int
    num_identical: int

    @property
    def identical(self) -> bool:
        """Every step decided the same."""
        return self.num_identical == self.num_steps

    def __str__(self) -> str:
        return f"decisions: identical in {self.num_identical} of {self.num_steps} steps"


class ReplayRunner:
    """Answers step N with what step N sampled, when step N ended.

    Args:
        run: the recording.
        clock: the engine's.
        known: who knows the tokens of all requests, where the run is one replica's: it may be sent another's.
    """

    def __init__(self, run: RecordedRun, clock: Clock, known: RecordedRun | None = None) -> None:
        self._end_times = run.steps["end_time"].tolist()
        # Older recordings know nothing of shared reads, and had none.
        kv = run.steps["num_kv_tokens"]
        self._saved = (kv - run.steps.get("num_distinct_kv_tokens", kv)).tolist()
        self._outputs = {row["request_id"]: row["output_token_ids"] for row in (known or run).requests}
        self._clock = clock
        self._index = 0

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> SimulatedStep:  # noqa: ARG002 - part of the protocol
        """Launch the next recorded step."""
        arrive_in_order(plan.copies)
        index = min(self._index, len(self._end_times) - 1)
        self._index += 1
        tokens = [
            self._token(entry.req, entry.start + entry.num_new_tokens) if sample else None
            for entry, sample in zip(plan.scheduled, plan.samples, strict=True)
        ]
        return SimulatedStep(tokens, self._end_times[index], self._clock, num_saved=self._saved[index])

    def release(self, request_ids: list[str]) -> None:
        """Nothing to forget."""

    def _token(self, req: Request, position: int) -> int:
        """The token at `position`; any, where none was recorded or overlap sampled past the end and dropped it."""
        outputs = self._outputs[req.request_id]
        index = position - req.num_prompt_tokens
        return int(outputs[index]) if outputs is not None and index < len(outputs) else 0


def replay(run: RecordedRun) -> ReplayResult:
    """Make the decisions of a recorded run again, until the first that differs."""
    clock = VirtualClock()
    engine = run.strategy().engine(ReplayRunner(run, clock), clock, overlap=run.overlap)
    waiting = deque(zip((row["submit_time"] for row in run.requests), run.make_requests(), strict=True))

    def due(now: float) -> Iterator[Request]:
        while waiting and waiting[0][0] <= now:
            yield waiting.popleft()[1]

    return follow(engine, run, due)


def follow(
    engine: Engine,
    run: RecordedRun,
    due: Callable[[float], Iterable[Request]],
    on_end: Callable[[Sequence[Request]], None] | None = None,
) -> ReplayResult:
    """Step an engine as a recorded run stepped, until it plans nothing where a step was recorded.

    Args:
        engine: of the same strategy; its runner is a `ReplayRunner` of the run.
        run: the recording.
        due: the requests that were handed over since the step before and up to the time that it is given.
        on_end: told which requests ended, refused ones too.
    """
    clock, recorder = engine.clock, RunRecorder()
    recorded = run.steps["decision_hash"]
    num_steps = len(recorded)
    starts, ends = run.steps["start_time"].tolist(), run.steps["end_time"].tolist()

    def take(step: StepOutput | None) -> bool:
        if step is not None:
            recorder.on_step(step)
            if on_end is not None:
                on_end([*step.finished, *step.plan.rejected])
        return step is not None

    for index in range(num_steps):
        if engine.in_flight and starts[index] >= ends[index - 1]:
            # The recorded loop had nothing to plan while the step before ran, and so waited for it.
            take(engine.step())
        clock.sleep_until(starts[index])
        for req in due(starts[index]):
            recorder.on_submit(req, starts[index])
            try:
                engine.add(req)
            except RequestRejected as error:
                recorder.on_rejected(req, starts[index], str(error))
                if on_end is not None:
                    on_end([req])
        if not take(engine.step()) and not engine.in_flight:
            break  # nothing to plan where a step was recorded
    while engine.in_flight and recorder.num_steps < num_steps:
        take(engine.step())
    found = recorder.step_columns()["decision_hash"][:num_steps]
    differs = np.flatnonzero(found != recorded[: len(found)])
    return ReplayResult(num_steps, int(differs[0]) if len(differs) else len(found))
