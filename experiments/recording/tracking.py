"""Runs in MLflow or Weights & Biases, beside their files on disk: section `tracking` of the config.

    config -> parameters | summary.json -> metrics | ledger over time -> step metrics | report, summary -> artifacts

A tracker is made before the run, so that a missing package or an unreachable server is known before any work, and told
of the run when its files are complete, so that a tracker that fails costs nothing but its own record.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvarena.engine.checks import check_choice
from kvarena.engine.classes import CLASSES
from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.explain import first_line
from kvarena.reports.reading.files import read_run

MAX_POINTS = 200  # of the ledger over time
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one MLflow request
ARTIFACTS = ("summary.json", "report.html")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        name: as reports call it.
        group: the sweep or experiment that it is a cell of; None for a run by itself.
        config: setting -> value, keys joined by dots.
        metrics: number of summary.json -> value, keys joined by dots.
        ledger: (seconds since the start, class -> share of the pool in [0, 1]) of at most 200 steps.
        artifacts: files.
    """

    name: str
    group: str | None
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    ledger: list[tuple[float, dict[str, float]]]
    artifacts: list[Path]


class Tracker(Protocol):
    """Keeps runs somewhere else."""

    def log(self, run: TrackedRun, run_dir: Path) -> None:
        """Keep `run`, whose folder is `run_dir`. May raise what its package raises."""
        ...


class MlflowTracker:
    """MLflow, through its client.

    Args:
        tracking_uri: a database or a server.
        experiment: name of the experiment, made where it does not exist.

    Raises:
        ConfigError: MLflow is missing, or `tracking_uri` cannot be used.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        _require("mlflow", "mlflow")
        # By default its client asks a server that is away for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)

        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
        except (MlflowException, OSError) as error:
            raise ConfigError(f"tracking.tracking_uri={tracking_uri} cannot be used: {first_line(error)}") from error

    def log(self, run: TrackedRun, run_dir: Path) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric, Param, RunTag

        tags = {"mlflow.runName": run.name, "kvarena.run_dir": str(run_dir.absolute())}
        if run.group:
            tags["kvarena.group"] = run.group
        created = self._client.create_run(self._experiment, tags={})
        run_id, start = created.info.run_id, created.info.start_time
        metrics = [Metric(name, value, start, 0) for name, value in run.metrics.items()]
        for index, (seconds, shares) in enumerate(run.ledger):
            at = start + round(1e3 * seconds)
            metrics += [Metric(f"ledger/{name}", share, at, index) for name, share in shares.items()]
        params = [Param(key, str(value)) for key, value in run.config.items()]
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        for first in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[first : first + MAX_METRICS])
        for path in run.artifacts:
            self._client.log_artifact(run_id, str(path))
        self._client.set_terminated(run_id)


class WandbTracker:
    """Weights & Biases.

    Args:
        project: name of the project.
        mode: `offline` leaves the record in the run's folder, for `wandb sync`; `online` sends it.

    Raises:
        ConfigError: wandb is missing, or nobody is logged in for mode=online.
    """

    def __init__(self, project: str, mode: str) -> None:
        _require("wandb", "wandb")
        check_choice("tracking.mode", mode, ("offline", "online"))
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            raise ConfigError("tracking.mode=online needs a key: run `wandb login`, or say tracking.mode=offline")
        self._project, self._mode = project, mode

    def log(self, run: TrackedRun, run_dir: Path) -> None:
        """See `Tracker.log`."""
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        kept = wandb.init(
            project=self._project, name=run.name, group=run.group,
            mode="online" if self._mode == "online" else "offline", dir=str(run_dir),
            config=dict(run.config), settings=settings, reinit="finish_previous",
        )  # fmt: skip
        for index, (seconds, shares) in enumerate(run.ledger):
            kept.log({f"ledger/{name}": share for name, share in shares.items()} | {"seconds": seconds}, step=index)
        kept.summary.update(dict(run.metrics))
        report = wandb.Artifact(f"report-{kept.id}", type="report")
        for path in run.artifacts:
            report.add_file(str(path))
        kept.log_artifact(report)
        kept.finish()


def tracked_run(
    name: str, group: str | None, config: Mapping[str, Any], summary: Mapping[str, Any], run_dir: Path
) -> TrackedRun:
    """What a tracker is told of a finished run.

    Args:
        name: as reports call it.
        group: the sweep or experiment that it is a cell of.
        config: the resolved config.
        summary: summary.json.
        run_dir: the run's folder.
    """
    numbers = {
        key: float(value)
        for key, value in _flat(summary)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    steps = read_run(run_dir).steps
    count = len(steps["end_time"])
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))
    ledger = [
        (float(steps["end_time"][row]), {name: float(steps[name][row] / steps["total"][row]) for name in CLASSES})
        for row in rows
    ]
    artifacts = [run_dir / name for name in ARTIFACTS if (run_dir / name).exists()]
    return TrackedRun(name, group, dict(_flat(config)), numbers, ledger, artifacts)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _require(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"tracking={package} needs {package}: pip install 'kvarena[tracking]'")
