"""Sweeps: `run.py -m` plans its cells, runs them in rounds and ends in one comparison report over them."""

from __future__ import annotations

import json
import signal
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

from kvarena.experiments.folders.lock import only_writer
from kvarena.experiments.folders.place import SWEEP, check_place
from kvarena.experiments.jobs.outcomes import outcome
from kvarena.experiments.recording.interruption import Interrupted, Signals, name_of, shown, whole_cells
from kvarena.experiments.settings.explain import first_line
from kvarena.experiments.sweeps.passed_on import cells_elsewhere
from kvarena.reports.reading.names import CELL_FILE, ERROR_FILE, MANIFEST_FILE, STUDY_FILE, SWEEP_FILE
from kvarena.reports.reading.writing import replacing, write_text

if TYPE_CHECKING:
    from kvarena.experiments.sweeps.sweep_plan import Job, Plan

PASSED_ON = ("JoblibLauncher", "LocalLauncher")  # whose cells run in children of this process
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


def run_sweep(config: DictConfig, loader: ConfigLoader, launcher: Launcher, overrides: list[Override]) -> None:
    """Run a sweep's cells, write sweep.json and the comparison, and leave both in ENDED_SWEEP.

    Args:
        config: the sweep's own config, with its hydra node.
        loader: composes a cell's config.
        launcher: runs cells.
        overrides: of the command line.

    Raises:
        ConfigError: as `make_plan`, the launcher and `check_place`.
        OSError: the sweep's folder cannot be made.
        NotWritten: nothing can be written there.
    """
    from kvarena.experiments.settings.loading import say_loading

    say_loading(enabled=OmegaConf.select(config, "report.progress") is True)
    from kvarena.experiments.sweeps.sweep_plan import (
        make_plan,  # late: a typing error must not wait for what it imports
    )

    sweep_dir = Path(config.hydra.sweep.dir)
    check_place(sweep_dir, SWEEP)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(sweep_dir):
        pass  # a folder in which nothing can be written is one line, not one for each cell
    plan = make_plan(config, loader, overrides)
    _say_how(plan, str(OmegaConf.select(config, "hydra.launcher._target_")))
    bugs: list[Exception] = []
    ended = EndedSweep()
    try:
        _launch(plan, config, launcher, bugs)
        ENDED_SWEEP.set(ended)
        try:
            _compare(sweep_dir, plan, config, ended)
        except Exception as error:
            ended.error = error
    except KeyboardInterrupt as stopped:
        ENDED_SWEEP.set(None)
        raise _interrupted(sweep_dir, plan, config, stopped) from None
    if bugs:
        ended.error = bugs[0]


def _launch(plan: Plan, config: DictConfig, launcher: Launcher, bugs: list[Exception]) -> None:
    """Run the plan's jobs; each gets its outcome."""
    name = str(OmegaConf.select(config, "hydra.launcher._target_")).rpartition(".")[2]
    number = 0
    for batch in plan.batches:
        commands = [job.command() for job in batch]
        with Signals() as signals, cells_elsewhere(signals, Path(config.hydra.sweep.dir), here=name not in PASSED_ON):
            try:
                returns = launcher.launch(commands, initial_job_idx=number)
            except (Exception, KeyboardInterrupt):
                # A launcher whose processes ended by the signal has an error of its own; Ray's is always SIGINT's.
                signals.check()
                raise
        number += len(batch)
        for job, returned in zip(batch, returns, strict=True):
            job.outcome = _outcome_of(job, returned, bugs)
        signals.check()
        for job in batch:
            if (by := job.outcome["interrupted"]) is not None:
                raise Interrupted(by)


def _interrupted(sweep_dir: Path, plan: Plan, config: DictConfig, stopped: KeyboardInterrupt) -> Interrupted:
    """What a sweep that a signal ended leaves: sweep.json of its whole cells, unless an earlier one's is there."""
    number = stopped.number if isinstance(stopped, Interrupted) else int(signal.SIGINT)
    with Signals() as signals, signals.patient(sealed=True):
        kept = {job: json.loads(text) for job in plan.jobs if (text := _text_of(job.folder / ERROR_FILE)) is not None}
        for job in plan.jobs:
            if not job.outcome and job in kept:
                job.outcome = outcome(job.folder, kept[job]["error"], not_defined=kept[job]["not_defined"])
        left = [job for job in plan.jobs if not _is_over(job)]
        for job in left:
            job.outcome = outcome(job.folder, "interrupted")
        for job in plan.jobs:
            job.outcome = job.outcome or outcome(job.folder)
        sweep = collect(sweep_dir, plan, config.report.baseline)
        names = {job.folder.name for job in left}
        sweep["failed"] = [entry for entry in sweep["failed"] if entry["folder"] not in names]
        if left:
            sweep["interrupted"] = {"by": name_of(number), "left": sorted(names)}
        with only_writer(sweep_dir):
            if not left or not has_result(sweep_dir):
                save_sweep(sweep_dir, sweep, config)
    words = whole_cells(len(sweep["runs"]), shown(sweep_dir)) + _parts(left)
    return Interrupted(number, words, "hydra.sweep.dir", sweep_dir)


def _parts(left: list[Job]) -> str:
    """What is kept of the cells that ran when the signal came; empty where nothing is."""
    manifests = [json.loads(text) for job in left if (text := _text_of(job.folder / MANIFEST_FILE)) is not None]
    came = [found for manifest in manifests if (found := manifest["run"].get("interrupted"))]
    if not came:
        return ""
    ended, given = (sum(one[key] for one in came) for key in ("num_ended", "num_requests"))
    cells = "the cell" if len(came) == 1 else f"the {len(came)} cells"
    return f"; of {cells} that ran {ended} of {given} requests had ended and are kept"


def _is_over(job: Job) -> bool:
    """Whether a job needs not run again: it is whole, or was refused."""
    if job.outcome:
        return job.outcome["interrupted"] is None
    return any((job.folder / name).exists() for name in (CELL_FILE, STUDY_FILE))


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


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


def _outcome_of(job: Job, returned: JobReturn, bugs: list[Exception]) -> dict[str, Any]:
    """What a launcher says of a job; the error of one that failed by a bug goes to `bugs`, and the sweep goes on."""
    try:
        value = returned.return_value
    except Exception as error:
        bugs.append(error)
        return outcome(job.folder, f"a bug: {type(error).__name__}: {first_line(error)}")
    return value if isinstance(value, dict) else outcome(job.folder, BROKEN_OFF)


def collect(sweep_dir: Path, plan: Plan, baseline: str | int | None) -> dict[str, Any]:
    """What sweep.json holds: this call's cells in the grid's order, whatever else lies in the sweep's folder.

    Args:
        sweep_dir: the sweep's folder.
        plan: its jobs, which have run.
        baseline: folder or name of the cell that the others are compared with; None takes the first.

    Returns:
        `runs` (folders), `baseline`, `rounds`, `command`, and name, folder and error of the cells that
        `failed`, are `not_defined`, and that ran and served nothing (`unserved`; also in `runs`).
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
    return {
        "runs": runs,
        "baseline": None if baseline is None else _baseline(plan, str(baseline)),
        "rounds": plan.rounds,
        "command": plan.command,
        "not_defined": [entry for entry in left_out if entry["not_defined"]],
        "failed": [entry for entry in left_out if not entry["not_defined"]],
        "unserved": unserved,
    }


def has_result(sweep_dir: Path) -> bool:
    """Whether an earlier sweep, which came to its end, left its sweep.json there, with cells in it."""
    try:
        found = json.loads((sweep_dir / SWEEP_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool(found.get("runs")) and not found.get("interrupted")


def save_sweep(sweep_dir: Path, sweep: dict[str, Any], config: DictConfig) -> None:
    """Write sweep.json and multirun.yaml. Raises NotWritten."""
    write_text(sweep_dir / SWEEP_FILE, json.dumps(sweep, indent=2) + "\n")
    with replacing(sweep_dir / "multirun.yaml") as partial:
        OmegaConf.save(config, partial)


def _baseline(plan: Plan, given: str) -> str:
    """The folder that a baseline names, by its whole name, without digits or round, or by the swept settings.

    Anything else may be a cell's name or label, which the comparison knows.
    """

    def names(job: Job) -> tuple[str, ...]:
        folder = Path(job.outcome["folder"]).name
        return folder, folder.rpartition("-r")[0], job.stem, job.name

    found = next((job for job in plan.jobs if given in names(job)), None)
    return given if found is None else Path(found.outcome["folder"]).name


def _compare(sweep_dir: Path, plan: Plan, config: DictConfig, ended: EndedSweep) -> None:
    """Compare the cells, then replace what an earlier sweep left: one that came to nothing leaves that as it was."""
    from rich.console import Console

    import kvarena.reports.pages.comparison
    import kvarena.reports.pages.terminal
    from kvarena.reports.pages.ending import LISTS, print_ending, sweep_ending
    from kvarena.reports.reading.errors import NothingRecorded, NotWritten, ReportError

    sweep = ended.record = collect(sweep_dir, plan, config.report.baseline)
    summary = None
    with only_writer(sweep_dir):
        try:
            summary = kvarena.reports.pages.comparison.compare_sweep(sweep_dir, sweep) if sweep["runs"] else None
        except NothingRecorded as nothing:  # as the command asked
            print(f"no comparison: {nothing}", file=sys.stderr)
        except NotWritten:
            save_sweep(sweep_dir, sweep, config)
            raise
        except ReportError:
            if not has_result(sweep_dir):
                save_sweep(sweep_dir, sweep | {"baseline": None}, config)
            raise
        if sweep["runs"] or not has_result(sweep_dir):
            save_sweep(sweep_dir, sweep, config)
    if summary is not None:
        Console().print(kvarena.reports.pages.terminal.comparison_table(summary))
    left_out = {name: sweep[name] for name in LISTS}
    print_ending(sweep_ending(sweep_dir, summary, left_out, runs=sweep["runs"]), full=config.report.json == "full")
