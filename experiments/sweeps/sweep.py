"""Sweeps: `run.py -m` plans its cells, runs them in rounds and ends in one comparison report over them."""

from __future__ import annotations

import json
import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from kvarena.experiments.folders.files import CELL_FILE, SWEEP_FILE

if TYPE_CHECKING:
    from kvarena.experiments.sweeps.sweep_plan import Job, Plan

BROKEN_OFF = "its process ended without a word"


@dataclass
class EndedSweep:
    """What became of a sweep.

    Attributes:
        record: what sweep.json holds; empty until the cells have run.
        error: why there is no comparison; None where there is one, or no cell to compare.
    """

    record: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


# Hydra drops what a multirun returns, so there is no other way to hand the sweep to the command line's exit code.
ENDED_SWEEP: ContextVar[EndedSweep | None] = ContextVar("ENDED_SWEEP", default=None)


def outcome(
    folder: Path, error: str | None = None, *, not_defined: bool = False, unserved: str | None = None
) -> dict[str, Any]:
    """What a job returns through its launcher, as plain values.

    Args:
        folder: where its files are.
        error: why it did not run; None where it did.
        not_defined: its settings mean nothing together.
        unserved: why none of its requests finished; None where one did.
    """
    return {"folder": str(folder), "error": error, "not_defined": not_defined, "unserved": unserved}


def run_sweep(config: DictConfig, loader: ConfigLoader, launcher: Launcher, overrides: list[Override]) -> None:
    """Run a sweep's cells, write sweep.json and the comparison, and leave both in ENDED_SWEEP.

    Args:
        config: the sweep's own config, with its hydra node.
        loader: composes a cell's config.
        launcher: runs cells.
        overrides: of the command line.

    Raises:
        ConfigError: as `make_plan` and the launcher.
        OSError: the sweep's folder cannot be made.
    """
    from kvarena.experiments.settings.loading import say_loading

    say_loading(enabled=OmegaConf.select(config, "report.progress") is True)
    from kvarena.experiments.sweeps.sweep_plan import (
        make_plan,  # late: a typing error must not wait for what it imports
    )

    sweep_dir = Path(config.hydra.sweep.dir)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, loader, overrides)
    OmegaConf.save(config, sweep_dir / "multirun.yaml")
    _say_how(plan, str(OmegaConf.select(config, "hydra.launcher._target_")))
    number = 0
    for batch in plan.batches:
        returns = launcher.launch([job.command() for job in batch], initial_job_idx=number)
        number += len(batch)
        for job, returned in zip(batch, returns, strict=True):
            job.outcome = _outcome_of(job, returned)
    ended = EndedSweep()
    ENDED_SWEEP.set(ended)
    try:
        _compare(sweep_dir, plan, config.report, ended)
    except Exception as error:
        ended.error = error


def _say_how(plan: Plan, launcher: str) -> None:
    """What a person might not expect of a sweep with rounds."""
    if plan.num_single:
        print(
            f"sweep.rounds={plan.rounds}: simulated cells run once, since a repeat is the same to the digit; other "
            "seeds repeat them (workload.seed=0,1,2)",
            file=sys.stderr,
        )
    if len(plan.batches) > 1 and not launcher.endswith("BasicLauncher"):
        print(
            f"sweep.rounds={plan.rounds}: one round ends before the next begins, but hydra/launcher may run the cells "
            "of a round at the same time; the basic one runs them one by one",
            file=sys.stderr,
        )


def _outcome_of(job: Job, returned: JobReturn) -> dict[str, Any]:
    """What a launcher says of a job; raises the error of one that failed by a bug."""
    value = returned.return_value
    return value if isinstance(value, dict) else outcome(job.folder, BROKEN_OFF)


def collect(sweep_dir: Path, plan: Plan, baseline: str | int | None) -> dict[str, Any]:
    """Write sweep.json: this call's cells in the grid's order, whatever else lies in the sweep's folder.

    Args:
        sweep_dir: the sweep's folder.
        plan: its jobs, which have run.
        baseline: folder or name of the cell that the others are compared with; None takes the first.

    Returns:
        What sweep.json holds: `runs` (folders), `baseline`, `rounds`, `command`, and name, folder and error of the
        cells that `failed`, are `not_defined`, and that ran and served nothing (`unserved`; also in `runs`).
    """
    runs, left_out, unserved = [], [], []
    for job in plan.jobs:
        folder = Path(job.outcome["folder"]).name
        entry = {"name": job.name + ("" if job.round is None else f", round {job.round}"), "folder": folder}
        if job.outcome["error"] is not None:
            left_out.append(entry | {"error": job.outcome["error"], "not_defined": job.outcome["not_defined"]})
        elif (sweep_dir / folder / CELL_FILE).exists():  # an experiment leaves none: it has a report of its own
            runs.append(folder)
        if job.outcome["unserved"] is not None:
            unserved.append(entry | {"error": job.outcome["unserved"]})
    sweep = {
        "runs": runs,
        "baseline": None if baseline is None else _baseline(plan, str(baseline)),
        "rounds": plan.rounds,
        "command": plan.command,
        "not_defined": [entry for entry in left_out if entry["not_defined"]],
        "failed": [entry for entry in left_out if not entry["not_defined"]],
        "unserved": unserved,
    }
    partial = sweep_dir / f"{SWEEP_FILE}.partial"
    partial.write_text(json.dumps(sweep, indent=2) + "\n")
    partial.rename(sweep_dir / SWEEP_FILE)
    return sweep


def _baseline(plan: Plan, given: str) -> str:
    """The folder that a baseline names, by its whole name, without digits or round, or by the swept settings.

    Anything else may be a cell's name or label, which the comparison knows.
    """

    def names(job: Job) -> tuple[str, ...]:
        folder = Path(job.outcome["folder"]).name
        return folder, folder.rpartition("-r")[0], job.stem, job.name

    found = next((job for job in plan.jobs if given in names(job)), None)
    return given if found is None else Path(found.outcome["folder"]).name


def _compare(sweep_dir: Path, plan: Plan, report: DictConfig, ended: EndedSweep) -> None:
    from rich.console import Console

    import kvarena.reports.pages.comparison
    import kvarena.reports.pages.terminal
    from kvarena.experiments.folders.cell_state import only_writer
    from kvarena.reports.pages.ending import LISTS, print_ending, sweep_ending
    from kvarena.reports.reading.errors import NothingRecorded

    with only_writer(sweep_dir):
        sweep = ended.record = collect(sweep_dir, plan, report.baseline)
        try:
            summary = kvarena.reports.pages.comparison.write_comparison(sweep_dir) if sweep["runs"] else None
        except NothingRecorded as nothing:  # as the command asked
            summary = None
            print(f"no comparison: {nothing}", file=sys.stderr)
    if summary is not None:
        Console().print(kvarena.reports.pages.terminal.comparison_table(summary))
    left_out = {name: sweep[name] for name in LISTS}
    print_ending(sweep_ending(sweep_dir, summary, left_out, runs=sweep["runs"]), full=report.json == "full")
