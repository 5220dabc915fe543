"""Does the simulator route and decide as real replicas do? Two real ones on this machine's CPU, each with a model
runner and a thread of its own, are recorded behind each router.

    record --> replay with the recorded arrivals and step times    every route and every decision hash must be the same
           --> simulate with the simulator's own clock             how many are the same, printed
                    ^-- a profile that was fitted to another recording of the same replicas
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.divergence import compare_decisions
from kvarena.experiments.simulation.fit import fit_profile
from kvarena.experiments.simulation.profiles import write_profile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.routed_replay import replay_routed
from kvarena.experiments.studies.base import Findings
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, at_least, check, measured

FITTED = "fitted"


@dataclass
class RoutingReplayStudy:
    """Records, replays and simulates replicas behind each router.

    Args:
        routers: by name.
        seed: of the workload that the profile is fitted to.

    Raises:
        ConfigError: no router.
    """

    routers: Sequence[str]
    seed: int

    def __post_init__(self) -> None:
        if not self.routers:
            raise ConfigError("study.routers is empty; name routers, such as [round_robin,kv_exact]")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        fit = self._record(cells, FITTED, [f"router={self.routers[0]}", f"workload.seed={self.seed}"])
        numbers = range(int(fit.manifest["replicas"]))
        profile = cells.out_dir / "profiles" / "replica.yaml"
        profile.parent.mkdir(parents=True, exist_ok=True)
        write_profile(fit_profile([fit.of_replica(number) for number in numbers]).profile, profile)
        claims, alike, steps = [], [], 0
        for name in self.routers:
            run = self._record(cells, name, [f"router={name}"])
            replayed = replay_routed(run)
            steps += sum(one.num_steps for one in replayed.replicas)
            same = sum(one.num_identical for one in replayed.replicas) / sum(one.num_steps for one in replayed.replicas)
            claims += [
                check(at_least(f"{name}: requests routed the same, recorded times", "%", 100.0,
                               100 * replayed.num_same_replica / replayed.num_requests)),
                check(at_least(f"{name}: steps that decide the same, recorded times", "%", 100.0, 100 * same,
                               note=f"{sum(one.num_steps for one in replayed.replicas):,} steps")),
            ]  # fmt: skip
            own = self._simulate(cells, name, profile)
            claims += self._own_clock(name, run, own)
            alike.append(replayed.identical)
        return Findings(
            title=f"Routers, replayed: {len(numbers)} real replicas on a CPU",
            headline="With the recorded arrivals and step times the simulator routes every request as the replicas "
            f"did, and every step decides the same, behind {sum(alike)} of {len(alike)} routers ({steps:,} steps).",
            source="Checks of our own: the simulator's routers, allocators and schedulers are those of the replicas.",
            claims=claims,
            notes=[
                "The cells computed on this machine. Beside each lies NAME-simulated, the simulator's run with its own "
                "clock.",
                "Each replica has a thread, an engine, a model and a pool of its own, all made by the one builder of "
                "engines; a router in the same process chooses.",
                "Own clock: the simulator is given the scheduled arrivals and a profile that was fitted to another "
                "recording. A request that comes a step earlier or later makes all steps behind it others.",
            ],
        )

    def _record(self, cells: CellRunner, name: str, overrides: Sequence[str]) -> RecordedRun:
        cells.run(f"{name}-recorded", overrides)
        return RecordedRun.read(cells.folders[-1])

    def _simulate(self, cells: CellRunner, name: str, profile: Path) -> RecordedRun:
        cells.run(f"{name}-simulated", [f"router={name}", "runner=simulated", f"runner.profile={profile.resolve()}"])
        # The report's cells are those that computed; this one is held against them.
        return RecordedRun.read(cells.folders.pop())

    def _own_clock(self, name: str, run: RecordedRun, own: RecordedRun) -> list[Claim]:
        routes = 100 * float(np.mean(np.array(run.routes[0]) == np.array(own.routes[0])))
        compared = [
            compare_decisions(run.of_replica(number).steps, own.of_replica(number).steps)
            for number in range(int(run.manifest["replicas"]))
        ]
        same, of = sum(one.num_same for one in compared), sum(one.num_steps for one in compared)
        return [
            measured(f"{name}: requests routed the same, own clock", "%", routes),
            measured(
                f"{name}: steps that decide the same, own clock", "%", 100 * same / of, note=f"{same:,} of {of:,}"
            ),
        ]
