"""Runs a scheduler of conf/scheduler on the simulated clock and keeps what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler
from kvarena.experiments.simulation.runner import SimulatedRunner
from kvarena.experiments.simulation.step_time import StepTime


def prompts_cost_most(features: StepFeatures) -> float:
    """Seconds of a step."""
    return 0.01 + 0.001 * features.num_prefill_tokens + 0.0005 * features.num_decode_requests


def request(name: str, num_prompt: int = 8, max_tokens: int = 8, **fields) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(name, [1] * num_prompt, sampling, oracle_output_len=max_tokens, **fields)


@dataclass
class Simulation:
    """A scheduler over a paged pool, fed by arrival times.

    Attributes:
        token_times: of each request, by id.
        steps: all that ran.
        order: request ids by their first scheduled step.
    """

    engine: Engine
    token_times: dict[str, list[float]] = field(default_factory=dict)
    steps: list[StepOutput] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def run(self, requests: list[Request], until: float = float("inf"), on_step=None) -> Simulation:
        """Step until all requests have ended, or the clock reads `until`; `on_step(output)` after each step."""
        engine, todo = self.engine, sorted(requests, key=lambda req: req.arrival_time)[::-1]
        while (todo or engine.has_work) and engine.clock.now() < until:
            while todo and todo[-1].arrival_time <= engine.clock.now():
                engine.add(todo.pop())
            output = engine.step()
            if output is None:
                if not engine.in_flight:
                    self._wait(todo)
                continue
            self._record(output)
            if on_step is not None:
                on_step(output)
        return self

    def _wait(self, todo: list[Request]) -> None:
        clock = self.engine.clock
        wake = self.engine.wake_time(clock.now())
        times = [time for time in (wake, todo[-1].arrival_time if todo else None) if time is not None]
        assert times, "requests wait and nothing is planned"
        clock.sleep_until(min(times))

    def _record(self, output: StepOutput) -> None:
        self.steps.append(output)
        for entry, token in zip(output.plan.scheduled, output.result.token_ids, strict=True):
            times = self.token_times.setdefault(entry.req.request_id, [])
            if entry.req.request_id not in self.order:
                self.order.append(entry.req.request_id)
            if token is not None:
                times.append(output.end_time)


def simulate(
    scheduler: str,
    *,
    num_blocks: int = 1000,
    block_size: int = 4,
    max_model_len: int = 4096,
    allocator: str = "paged",
    overlap: bool = False,
    step_time: StepTime = prompts_cost_most,
    **options,
) -> Simulation:
    """A simulation of conf/scheduler/SCHEDULER.yaml with `options`, over a pool of num_blocks x block_size slots."""
    blocks = build_allocator(allocator, num_blocks=num_blocks, max_model_len=max_model_len, block_size=block_size)
    policy = build_scheduler(scheduler, blocks, max_model_len=max_model_len, **options)
    clock = VirtualClock()
    runner = SimulatedRunner(step_time, clock)
    return Simulation(Engine(policy, blocks, runner, clock, overlap=overlap, ledger=MemoryLedger()))
