"""A sweep: cells in folders of their own names, in rounds, and one comparison; `sweep.py` does the work.

Hydra has every plugin before it has read the command line: nothing is imported here that takes time.
"""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class KvarenaSweeper(Sweeper):
    """Runs the product of the swept values; options in conf/hydra/sweeper/kvarena.yaml.

    Args:
        params: overrides that go before those of the command line, swept or not.
    """

    # Hydra takes plugins of the package `hydra_plugins` alone; registered (`entry.py`), they may live anywhere.
    __module__ = "hydra_plugins.kvarena"

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__()
        self._params = params or {}
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what the sweep will need."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run every cell and compare them. Raises as `kvarena.experiments.sweeps.sweep.run_sweep`."""
        from kvarena.experiments.sweeps.sweep import run_sweep

        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        given = [*(f"{key}={value}" for key, value in self._params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(given)
        return run_sweep(self.config, loader, self.launcher, overrides)
