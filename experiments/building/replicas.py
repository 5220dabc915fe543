"""Builds several replicas of the engine that a config describes, as any other engine, and the router before them."""

from __future__ import annotations

from dataclasses import dataclass

from kvarena.engine.errors import ConfigError
from kvarena.engine.routing import Router
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.parts import EngineParts, target_device
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.load.turns import RealTurns, TaskClock, Turns, VirtualTurns
from kvarena.experiments.settings.config import RunConfig, SimulatedRunnerConfig
from kvarena.experiments.settings.strategies import make_part


@dataclass
class ReplicaSet:
    """Replicas, ready to run.

    Attributes:
        router: decides who gets a request.
        parts: of each replica.
        turns: one clock for all; the task of replica i is i + 1.
    """

    router: Router
    parts: list[EngineParts]
    turns: Turns

    def take_clock(self) -> None:
        """The engines go by the clock of all from here on; simulated ones always did, and so do their runners."""
        for number, parts in enumerate(self.parts):
            if parts.simulator is None:
                parts.engine.clock = parts.clock = TaskClock(self.turns, number + 1)


def build_replicas(config: RunConfig) -> ReplicaSet:
    """Build the replicas and the router that `config` describes. No replica shares anything with another one.

    Raises:
        KvarenaError: as `build_engine`, or the router does not fit the rest of the config.
    """
    assert config.router is not None
    router: Router = make_part(Router, config.router)
    count, key = router.num_replicas, f"router.num_replicas={router.num_replicas}"
    config.driver.check_scores("several replicas keep none")
    if config.driver.cache == "warm":
        raise ConfigError(f"driver.cache=warm fills one cache, and {key} has several; leave it out")
    turns: Turns
    if isinstance(config.runner, SimulatedRunnerConfig):
        turns = VirtualTurns(count + 1)
        parts = [build_engine(config, clock=TaskClock(turns, number + 1)) for number in range(count)]
        return ReplicaSet(router, parts, turns)
    if target_device(config.engine.device) == "cuda":
        raise ConfigError(
            f"{key} replicas in one process are for CPUs (engine.device=cpu) and for runner=simulated; on GPUs start "
            "servers, a router before them (docs/serving.md), and measure that with target=URL"
        )
    return ReplicaSet(router, [build_engine(config, SharedParts()) for _ in range(count)], RealTurns(count + 1))
