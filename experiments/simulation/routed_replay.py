"""Replays a recorded run of several replicas: does the router send every request where it did, given the recorded
arrivals and step times, and does every replica decide the same in every step?

The router is asked at the recorded moments, and sees replicas that run the real allocators and schedulers on the
recorded times. What it answers is what happens: a request that it sends elsewhere is computed elsewhere, and nothing
puts it right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from kvarena.engine.request import Request
from kvarena.engine.routing import Router
from kvarena.experiments.load.replicas import Replica, RouterTask, RoutingLog
from kvarena.experiments.load.turns import TaskClock, VirtualTurns
from kvarena.experiments.recording.totals import RunTotals
from kvarena.experiments.settings.strategies import make_part
from kvarena.experiments.settings.targets import Part
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.replay import ReplayResult, ReplayRunner, follow


@dataclass(frozen=True)
class RoutedReplayResult:
    """How far a replay followed its recording.

    Attributes:
        num_requests: that were routed.
        num_same_replica: of these, sent to the same replica.
        replicas: of each replica, how many steps decided the same.
    """

    num_requests: int
    num_same_replica: int
    replicas: tuple[ReplayResult, ...]

    @property
    def identical(self) -> bool:
        """Every request went where it did, and every step decided the same."""
        return self.num_same_replica == self.num_requests and all(one.identical for one in self.replicas)

    def __str__(self) -> str:
        steps, same = (sum(getattr(one, name) for one in self.replicas) for name in ("num_steps", "num_identical"))
        return (
            f"routes: the same of {self.num_same_replica} of {self.num_requests} requests; "
            f"decisions: identical in {same} of {steps} steps of {len(self.replicas)} replicas"
        )


def replay_routed(run: RecordedRun) -> RoutedReplayResult:
    """Route and run a recorded run again.

    Raises:
        ConfigError: it was no run behind a router, or its manifest does not name the classes.
    """
    recorded, times = run.routes
    router: Router = make_part(Router, Part("router", run.manifest["config"]["router"]))
    turns, log = VirtualTurns(router.num_replicas + 1), RoutingLog()
    runs = [run.of_replica(number) for number in range(router.num_replicas)]
    replicas = []
    for number, one in enumerate(runs):
        clock = TaskClock(turns, number + 1)
        engine = one.strategy().engine(ReplayRunner(one, clock, known=run), clock, overlap=run.overlap)
        replicas.append(Replica(engine, RunTotals()))
    task, results, clock = RouterTask(router, replicas, log), dict[int, ReplayResult](), TaskClock(turns, 0)

    def route() -> None:
        for req, when in zip(run.make_requests(), times, strict=True):
            clock.sleep_until(when)
            task.send(req, when)
        while len(results) < len(replicas):
            clock.wait_until(inf)

    def serve(number: int) -> None:
        replica = replicas[number]

        def due(_: float) -> Iterable[Request]:
            return replica.take_inbox()

        def on_end(ended: Sequence[Request]) -> None:
            replica.ended(ended)

        results[number] = follow(replica.engine, runs[number], due, on_end)
        turns.wake(0)

    turns.run([route, *((lambda number=number: serve(number)) for number in range(len(replicas)))])
    same = sum(ours == theirs for ours, theirs in zip(log.replicas, recorded, strict=True))
    return RoutedReplayResult(len(recorded), same, tuple(results[number] for number in range(len(replicas))))
