"""The main job: build what the config says, run it, write the run's files and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

import kvarena.reports.pages.ending
import kvarena.reports.pages.run_report
import kvarena.reports.pages.terminal
from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.folders.cell_folders import CellFolders, owner_of, result_in, result_of, whole_key
from kvarena.experiments.folders.cell_state import cell_key, differing, finished_key, mark_finished
from kvarena.experiments.folders.lock import only_writer
from kvarena.experiments.folders.place import RUN, check_place
from kvarena.experiments.folders.run_folder import Measured, write_run
from kvarena.experiments.jobs.engine_job import run_engine
from kvarena.experiments.jobs.manifest import manifest_of
from kvarena.experiments.jobs.output import HttpProgress
from kvarena.experiments.jobs.replicas_job import run_replicas
from kvarena.experiments.jobs.unserved import Unserved, why_unserved
from kvarena.experiments.recording.interruption import Interrupted, Signals, shown
from kvarena.experiments.recording.tracking import TrackedRun, Tracker, tracked_run
from kvarena.experiments.settings.command_line import command_of
from kvarena.experiments.settings.compose import named_choices
from kvarena.experiments.settings.config import ReportConfig, RunConfig, SweepConfig
from kvarena.experiments.settings.explain import first_line
from kvarena.experiments.settings.targets import instantiate
from kvarena.reports.reading.errors import NotWritten
from kvarena.reports.reading.names import cell_name

OTHERS = {"code": "other code", "machine": "another machine"}


def run_job(config: RunConfig, on_start: Callable[[Path], None], shared: SharedParts | None = None) -> Path:
    """Run one cell and print what it came to; a sweep's cells print nothing, for the sweep does.

    Args:
        config: of the cell.
        on_start, shared: see `execute`.

    Returns:
        The cell's folder: a sweep's cell that its launcher placed on another machine has one of its own.

    Raises:
        Unserved: none of its requests finished; its folder is complete.
        KvarenaError: a bad setting or a failed run.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    choices = named_choices(hydra.runtime.choices)
    sweep, in_sweep = config.sweep, hydra.mode is RunMode.MULTIRUN
    if in_sweep:
        run_dir = _own_folder(config, run_dir, choices)
    elif sweep.rounds != 1:
        raise ConfigError(
            f"sweep.rounds={sweep.rounds} repeats the cells of a sweep, and this is none; leave it out, or sweep "
            "with -m"
        )
    else:
        _check_owner(config, run_dir, choices)
    group = str(run_dir.parent) if in_sweep else None
    name = cell_name(choices["allocator"], choices["scheduler"], choices.get("router"))
    summary = execute(
        config, run_dir, name, choices, group, shared, command=command_of(hydra, alone=in_sweep), on_start=on_start,
    )  # fmt: skip
    if not in_sweep:
        Console().print(kvarena.reports.pages.terminal.run_table(summary))
        kvarena.reports.pages.ending.print_ending(
            kvarena.reports.pages.ending.run_ending(run_dir, summary), full=config.report.json == "full"
        )
    if (reason := why_unserved(summary)) is not None:
        raise Unserved(reason, run_dir)
    return run_dir


def _own_folder(config: RunConfig, run_dir: Path, choices: dict[str, str]) -> Path:
    """The cell's folder: `run_dir` where that is this cell's, as this machine and its code see it."""
    sweep, key = config.sweep, cell_key(config, choices)
    if owner_of(run_dir) in (None, whole_key(key)) or (sweep.allow_mixed and result_in(run_dir) == result_of(key)):
        return run_dir
    return CellFolders(run_dir.parent).claim(run_dir.name, key, allow_mixed=sweep.allow_mixed)


def _check_owner(config: RunConfig, run_dir: Path, choices: dict[str, str]) -> None:
    """A run by itself must not sit down in the folder that a sweep or an experiment keeps for one of its cells."""
    owner = owner_of(run_dir)
    if owner is not None and result_in(run_dir) is None and owner != whole_key(cell_key(config, choices)):
        raise ConfigError(
            f"{run_dir} belongs to a cell of a sweep or an experiment; give this run a folder of its own "
            "(hydra.run.dir=DIR)"
        )


def execute(
    config: RunConfig,
    run_dir: Path,
    name: str,
    choices: dict[str, str],
    group: str | None = None,
    shared: SharedParts | None = None,
    command: Sequence[str] | None = None,
    on_start: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Run one cell into `run_dir`, unless it is finished there, and return its report's summary.

    Waits while another process runs a cell there. A cell that is refused writes nothing; one whose report cannot be
    made is finished all the same, and the next call makes the report.

    Args:
        config: of the cell.
        run_dir: an existing folder.
        name: how the cell is called in reports.
        choices: the config groups' chosen options (`allocator`, `scheduler`, `workload`, `arrival`).
        group: the sweep or experiment that the cell belongs to, for a tracker.
        shared: model and runner of the cells that run in this process, one after the other; None: its own.
        command: the words that run this cell again; None where nobody knows them.
        on_start: called with `run_dir` before the first file of a cell that is not finished there.

    Raises:
        KvarenaError: a bad setting, a folder that belongs to something else, or a failed run.
        NotWritten: a file cannot be written.
    """
    report, sweep = config.report, config.sweep
    tracker: Tracker | None = instantiate(config.tracking)
    key = cell_key(config, choices)
    if (found := _found(run_dir, key, sweep)) is not None and not _lacks_report(run_dir, found, key, report):
        _say_kept(name, run_dir, found, key)
        return kvarena.reports.pages.run_report.read_summary(run_dir)
    with Signals() as signals, only_writer(run_dir):
        if (found := _found(run_dir, key, sweep)) is not None:
            _say_kept(name, run_dir, found, key)
            return _report_again(run_dir, found, key, report)
        if on_start is not None:
            on_start(run_dir)
        if config.target is None and config.router is None:
            measured = run_engine(config, name, shared, signals)
        elif config.target is None:
            measured = run_replicas(config, name, signals)
        else:
            from kvarena.experiments.jobs.http_job import run_http  # late: few machines with a GPU have its packages

            measured = run_http(config, lambda count: HttpProgress(name, count, report.progress), signals)
        manifest = manifest_of(config, name, choices, command) | measured.facts
        manifest["workload"] = {"name": choices["workload"]} | manifest["workload"]
        if (came := manifest["run"].get("interrupted")) is not None:
            _keep_part(run_dir, manifest, measured, came, signals)
        write_run(run_dir, manifest, measured.write)
        mark_finished(run_dir, key | {"reports": None})
        try:
            signals.let_go()
            signals.check()
            summary = _write_report(run_dir, pages=report.pages)
        except Interrupted as stopped:
            whole = f"all requests had ended and are in {shown(run_dir)}, without a report (kvarena report makes it)"
            raise Interrupted(stopped.number, whole) from None
        mark_finished(run_dir, key)
    if summary["num_failed"]:
        example = next(kind["example"] for kind in summary["rejections"] if kind["finish_reason"] == "error")
        failed = f"{summary['num_failed']} of {summary['num_requests']} requests failed"
        print(f"warning: {name}: {failed}, such as by: {example}", file=sys.stderr)
    if tracker is not None:
        _track(tracker, tracked_run(name, group, manifest["config"], summary, run_dir), run_dir)
    return summary


def _keep_part(
    run_dir: Path, manifest: dict[str, Any], measured: Measured, came: dict[str, Any], signals: Signals
) -> NoReturn:
    """Write the files of a run that did not come to its end, and raise what ended it."""
    error = measured.error
    try:
        write_run(run_dir, manifest, measured.write)
    except Exception as why:
        if error is None or isinstance(why, NotWritten):
            raise
        print(f"warning: what had been measured cannot be kept ({first_line(why)})", file=sys.stderr)
        raise error from None
    kept = f"{came['num_ended']} of {came['num_requests']} requests had ended and are kept in {shown(run_dir)}"
    if error is not None and not isinstance(error, Interrupted):
        print(f"warning: {kept}", file=sys.stderr)
        raise error
    assert signals.number is not None
    raise Interrupted(signals.number, f"{kept} (kvarena report {shlex.quote(shown(run_dir))})")


def _found(run_dir: Path, key: dict[str, Any], sweep: SweepConfig) -> dict[str, Any] | None:
    """cell.json of the cell that is finished in `run_dir`; None where none is. Raises as the two that look."""
    check_place(run_dir, RUN)
    return finished_key(run_dir, key, allow_mixed=sweep.allow_mixed)


def _say_kept(name: str, run_dir: Path, found: dict[str, Any], key: dict[str, Any]) -> None:
    words = [OTHERS[part] for part in differing(found, key)]
    how = f" with {' and '.join(words)} (kept by sweep.allow_mixed)" if words else ""
    print(f"{name}: finished before{how}, in {run_dir}", file=sys.stderr)


def _lacks_report(run_dir: Path, found: dict[str, Any], key: dict[str, Any], report: ReportConfig) -> bool:
    """Whether other code made the report of a finished cell, or none has."""
    return found.get("reports") != key["reports"] or (report.pages and not (run_dir / "report.html").exists())


def _report_again(run_dir: Path, found: dict[str, Any], key: dict[str, Any], report: ReportConfig) -> dict[str, Any]:
    """The summary of a finished cell; its report is made again where other code made it, or where it has none."""
    if not _lacks_report(run_dir, found, key, report):
        return kvarena.reports.pages.run_report.read_summary(run_dir)
    try:
        summary = _write_report(run_dir, pages=report.pages or (run_dir / "report.html").exists())
        mark_finished(run_dir, found | {"reports": key["reports"]})
    except NotWritten as error:
        if not (run_dir / "summary.json").exists():
            raise
        print(f"warning: its report stays as it was: {error}", file=sys.stderr)
        return kvarena.reports.pages.run_report.read_summary(run_dir)
    return summary


def _write_report(run_dir: Path, *, pages: bool) -> dict[str, Any]:
    return (
        kvarena.reports.pages.run_report.write_run_report if pages else kvarena.reports.pages.run_report.write_summary
    )(run_dir)


def _track(tracker: Tracker, run: TrackedRun, run_dir: Path) -> None:
    """Tell the tracker; whatever it raises, the run's own files are complete."""
    try:
        tracker.log(run, run_dir)
    except Exception as error:
        reason = f"the tracker did not take the run ({first_line(error)})"
        print(f"warning: {reason}; its files are in {run_dir}", file=sys.stderr)
