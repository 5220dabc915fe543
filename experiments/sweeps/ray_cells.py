"""Cells as tasks of a Ray cluster, through Ray's own API (`hydra/launcher=ray`).

    driver: sweep folder, code hash --+--> task: same code? folder seen? --> run the cell into its folder --> JobReturn
                                      +--> task ...

Every node needs this project, installed from the same code, and the sweep's folder under the same path.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.sources import code_hash
from kvarena.experiments.jobs.outcomes import outcome
from kvarena.experiments.jobs.output import progress_bar
from kvarena.experiments.recording.interruption import SIGNALS
from kvarena.experiments.settings.explain import first_line

CONNECT_TIMEOUT = 5.0  # seconds
STOP_TIMEOUT = 120.0  # seconds for the step and the files of cells that are cancelled


@dataclass(frozen=True)
class _Sweep:
    """What all tasks of a sweep get."""

    config: DictConfig
    hydra_context: HydraContext
    task_function: TaskFunction
    singletons: dict[Any, Any]
    cwd: str
    folder: str
    witness: str  # a file of the driver's in `folder`
    code: str


def run_cells(
    address: str,
    needs: dict[str, float],
    setup: tuple[DictConfig, HydraContext, TaskFunction],
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run a sweep's cells; one whose worker died returns its error, and the others go on.

    Args:
        address: of the cluster: `local`, `auto` or host:port.
        needs: `num_cpus`, above 0, and `num_gpus` that a cell asks it for.
        setup: the sweep's config with its hydra node, Hydra's config loader and callbacks, and what runs one cell.
        job_overrides: the cells' overrides.
        first: number of the first cell.

    Raises:
        ConfigError: a number is out of range, Ray is missing, its cluster cannot be reached or holds no such cell, a
            node has other code or does not see the sweep's folder.
    """
    check_number("hydra.launcher.num_cpus", needs["num_cpus"], above=True)
    check_number("hydra.launcher.num_gpus", needs["num_gpus"])
    try:
        import ray
    except ImportError:
        raise ConfigError("hydra/launcher=ray needs Ray: pip install 'kvarena[ray]'") from None
    setup_globals()
    folder = Path(str(setup[0].hydra.sweep.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    witness = folder / f".ray-{uuid.uuid4().hex}"
    sweep = _Sweep(*setup, Singleton.get_state(), os.getcwd(), str(folder), str(witness), code_hash())
    _connect(ray, address)
    try:
        _check_room(ray, **needs)
        witness.touch()
        # A cell that broke off is not tried again behind the user's back: its folder says what it was.
        submit = ray.remote(_run_cell).options(max_retries=0, **needs).remote
        return _gather(ray, submit, sweep, job_overrides, first)
    finally:
        ray.shutdown()
        witness.unlink(missing_ok=True)


def _connect(ray: Any, address: str) -> None:
    try:
        if ":" in address and "://" not in address:  # Ray itself waits for minutes where nobody listens
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
        # What cells print goes to Ray's logs: of several at once it is no text that a person can read.
        with _own_signals():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"hydra.launcher.address={address}: no Ray cluster answers there ({first_line(error)}); start one with "
            "`ray start --head`, or say hydra.launcher.address=local"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """A signal does behind the block what it did before: Ray would end the process, and what cells measured is lost."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_room(ray: Any, num_cpus: float, num_gpus: float) -> None:
    """A task that no node can ever hold would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        raise ConfigError(
            f"no node of the Ray cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs for a cell; lower "
            "hydra.launcher.num_cpus or hydra.launcher.num_gpus"
        )


def _gather(
    ray: Any, start: Callable[..., Any], sweep: _Sweep, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Start all cells, and return what they returned, in their order."""
    shared = ray.put(sweep)
    pending = {start(first + at, list(overrides), shared): at for at, overrides in enumerate(job_overrides)}
    returns: dict[int, JobReturn] = {}
    with closing(progress_bar("cells", len(pending), "cells", enabled=sweep.config.report.progress)) as bar:
        while pending:
            try:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
            except KeyboardInterrupt:  # each ends with its step; until all have written what they measured
                for task in pending:
                    ray.cancel(task)
                ray.wait(list(pending), num_returns=len(pending), timeout=STOP_TIMEOUT)
                raise
            at = pending.pop(ended)
            try:
                returns[at] = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                returns[at] = _broken_off(sweep, job_overrides[at], error)
            bar.update()
    return [returns[at] for at in sorted(returns)]


def _run_cell(index: int, overrides: list[str], sweep: _Sweep) -> JobReturn:
    """One cell, in a process of the cluster."""
    _check_node(sweep)
    os.chdir(sweep.cwd)
    setup_globals()
    Singleton.set_state(sweep.singletons)
    config = sweep.hydra_context.config_loader.load_sweep_config(sweep.config, overrides)
    with open_dict(config):
        config.hydra.job.id = index
        config.hydra.job.num = index
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=sweep.hydra_context, task_function=sweep.task_function, config=config,
        job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip


def _check_node(sweep: _Sweep) -> None:
    host = os.uname().nodename
    if not Path(sweep.witness).exists():
        raise ConfigError(
            f"node {host} does not see the sweep's folder {sweep.folder}; sweep into one that all nodes share under "
            "the same path (hydra.sweep.dir=DIR)"
        )
    if code_hash() != sweep.code:
        raise ConfigError(f"node {host} has other code of kvarena than the driver; install the same commit there")


def _broken_off(sweep: _Sweep, overrides: Sequence[str], error: Exception) -> JobReturn:
    """What a cell whose worker died came to."""
    subdir = next(item.partition("=")[2] for item in overrides if item.startswith("hydra.sweep.subdir="))
    ended = JobReturn(overrides=list(filter_overrides(overrides)), status=JobStatus.COMPLETED)
    ended.return_value = outcome(Path(sweep.folder) / subdir, f"its Ray worker ended: {first_line(error)}")
    return ended
