"""A sweep's cells as tasks of a Ray cluster; `ray_cells.py` does the work.

Hydra has every plugin before it has read the command line: nothing is imported here that takes time.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Runs cells on a Ray cluster; options in conf/hydra/launcher/ray.yaml.

    Args:
        address: `local` starts a cluster for this sweep alone; `auto` takes one that runs on this machine; else
            host:port of one.
        num_cpus: CPUs that each cell asks for, above 0.
        num_gpus: GPUs that each cell asks for, at least 0.
    """

    # Hydra takes plugins of the package `hydra_plugins` alone; registered (`entry.py`), they may live anywhere.
    __module__ = "hydra_plugins.kvarena"

    def __init__(self, address: str, num_cpus: float, num_gpus: float) -> None:
        super().__init__()
        self._options = str(address), {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._setup: tuple[DictConfig, HydraContext, TaskFunction] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what the tasks will need."""
        self._setup = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every cell. Raises as `kvarena.experiments.sweeps.ray_cells.run_cells`."""
        from kvarena.experiments.sweeps.ray_cells import run_cells

        assert self._setup is not None
        return run_cells(*self._options, self._setup, job_overrides, initial_job_idx)
