"""The main job: build what the config says, run it, write the run's files and its report."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

import kvarena.reports.pages.ending
import kvarena.reports.pages.run_report
import kvarena.reports.pages.terminal
from kvarena.engine.errors import ConfigError
from kvarena.engine.pool.gpu_memory import NO_GPU
from kvarena.experiments.building.build import build
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.building.warm_up import warm_cache, warm_up
from kvarena.experiments.folders.cell_folders import CellFolders, owner_of, result_in, result_of, whole_key
from kvarena.experiments.folders.cell_state import cell_key, differing, finished_key, mark_finished, measured_config
from kvarena.experiments.folders.lock import only_writer
from kvarena.experiments.folders.place import RUN, check_place
from kvarena.experiments.folders.provenance import git_state, machine, peak_rss_bytes, utc_now, versions
from kvarena.experiments.folders.run_folder import Measured, write_run
from kvarena.experiments.folders.sources import sources_of
from kvarena.experiments.jobs.output import HttpProgress, Progress
from kvarena.experiments.jobs.unserved import Unserved, why_unserved
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.contention import Contention
from kvarena.experiments.recording.interruption import Interrupted, Signals, name_of, shown
from kvarena.experiments.recording.recording import Recording, recording_warning
from kvarena.experiments.recording.tracking import TrackedRun, Tracker, tracked_run
from kvarena.experiments.settings.command_line import command_of
from kvarena.experiments.settings.compose import NAMING_GROUPS
from kvarena.experiments.settings.config import ReportConfig, RunConfig, SweepConfig
from kvarena.experiments.settings.explain import first_line
from kvarena.experiments.settings.targets import instantiate
from kvarena.reports.reading.errors import NotWritten
from kvarena.reports.reading.names import cell_name

SCHEMA_VERSION = 1

OTHERS = {"code": "other code", "machine": "another machine"}


def run_job(config: RunConfig, on_start: Callable[[Path], None]) -> Path:
    """Run one cell and print what it came to; a sweep's cells print nothing, for the sweep does.

    Args:
        config: of the cell.
        on_start: see `execute`.

    Returns:
        The cell's folder: a sweep's cell that its launcher placed on another machine has one of its own.

    Raises:
        Unserved: none of its requests finished; its folder is complete.
        KvarenaError: a bad setting or a failed run.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    choices = {group: hydra.runtime.choices[group] for group in NAMING_GROUPS}
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
    name = cell_name(choices["allocator"], choices["scheduler"])
    summary = execute(
        config, run_dir, name, choices, group, command=command_of(hydra, alone=in_sweep), on_start=on_start,
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
        if config.target is None:
            measured = _run_here(config, name, shared, signals)
        else:
            from kvarena.experiments.jobs.http_job import run_http  # late: few machines with a GPU have its packages

            measured = run_http(config, lambda count: HttpProgress(name, count, report.progress), signals)
        manifest = _manifest(config, name, choices, command) | measured.facts
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


def _run_here(config: RunConfig, name: str, shared: SharedParts | None, signals: Signals) -> Measured:
    """Run the cell on this process's engine."""
    setup = build(config, shared)
    warmup_time = 0.0
    if setup.driver.warmup and setup.parts.simulator is None:
        warmup_time = warm_up(config, setup.parts, [next(iter(setup.load.requests)).sampling])
    if setup.driver.cache == "warm":
        warmup_time += warm_cache(config, setup.parts, setup.load.requests)
    contention = None if setup.parts.simulator is not None else Contention(setup.driver.probe, _on_gpu(config))
    if contention is not None:
        contention.before()
    simulator = setup.parts.simulator
    progress = Progress(name, len(setup.load.requests), config.report.progress)
    # A simulated run may have a million requests; in one that computes nothing is made while it is measured.
    requests = list(setup.load.requests) if simulator is None else setup.load.requests
    recording = Recording(
        setup.parts.engine, level=setup.driver.record, kv_map=config.report.kv_map,
        scores=setup.driver.scores > 0, measured=simulator is None,
    )  # fmt: skip
    gpu, model = setup.parts.gpu_memory, setup.parts.model
    if gpu is not None and model is not None:
        gpu.begin(model.modules, model.image_cache_bytes)
    # The host's garbage collector would show as pauses of single steps: collect now, then only by reference counts.
    gc.collect()
    gc.freeze()
    error: BaseException | None = None
    try:
        setup.parts.clock.reset()
        signals.hold()  # until the files are written: nothing of what is measured from here on is to be lost
        with contention or nullcontext(), recording:
            drive(
                setup.parts.engine, requests, recording, closed_loop=setup.load.closed_loop, on_progress=progress,
                after_step=None if simulator is None else simulator.after_step, signals=signals,
            )  # fmt: skip
    except (Exception, Interrupted) as broken:
        if not recording.num_finished:
            raise
        error = broken
    finally:
        signals.hold(sealed=True)
        gc.unfreeze()
        progress.finish(recording)
    ended = utc_now()
    interrupted = _interrupted(recording, len(setup.load.requests), signals, error)
    memory = NO_GPU if gpu is None or error is not None else gpu.parts()
    # After the memory, for the probe has some of its own; before the files, whose writing is no part of the run.
    found = None if contention is None or interrupted is not None else contention.after()
    run = recording.facts()
    # A run that served nobody took no time of which a share would say anything.
    if simulator is None and run["num_steps"] and (slow := recording_warning(run)) is not None:
        print(f"warning: {name}: {slow}", file=sys.stderr)
    facts = setup.load.manifest() | {
        "model": _model_facts(setup.parts),
        "pool": setup.parts.pool_facts,
        "simulation": _simulation_facts(setup.parts, recording, name),
        "memory": memory,
        "contention": found,
        "run": run
        | {
            "ended": ended,
            "peak_rss_bytes": peak_rss_bytes(),
            # A virtual clock waits for its driver: nothing is late.
            "lateness_bound": setup.driver.max_lateness if simulator is None else None,
            "warmup_time": warmup_time,
            "interrupted": interrupted,
        },
    }
    return Measured(facts, recording.write, error)


def _interrupted(
    recording: Recording, num_requests: int, signals: Signals, error: BaseException | None
) -> dict[str, Any] | None:  # fmt: skip
    """How far a run came that did not come to its end; None of one that did, with or without a signal."""
    if error is None and (signals.number is None or recording.num_finished == num_requests):
        return None
    by = name_of(signals.number) if signals.number is not None else f"{type(error).__name__}: {first_line(error)}"
    return recording.interrupt(by, num_requests)


def _simulation_facts(parts: EngineParts, recording: Recording, name: str) -> dict[str, Any] | None:
    """The profile, and what of the run lies outside of what it was fitted to, which is said at once; else None."""
    columns = recording.step_columns()
    if parts.simulation_facts is None or parts.outside is None or columns is None:
        return parts.simulation_facts
    outside = parts.outside(columns)
    for line in outside:
        print(f"warning: {name}: {line}", file=sys.stderr)
    return parts.simulation_facts | {"outside": outside}


def _manifest(config: RunConfig, name: str, choices: dict[str, str], command: Sequence[str] | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": utc_now("seconds"),
        "strategy": {
            "allocator": choices["allocator"],
            "scheduler": choices["scheduler"],
            "details": config.allocator.settings | config.scheduler.settings,
        },
        "arrival": {"name": choices["arrival"]} | config.arrival.settings,
        "config": config.values,
        "round": config.sweep.round,
        "command": None if command is None else list(command),
        "git": git_state(),
        "sources": sources_of(measured_config(config.values)) | git_state(),
        "machine": machine(),
        "versions": versions(),
    }


def _on_gpu(config: RunConfig) -> bool:
    return config.engine.device != "cpu" and torch.cuda.is_available()


def _model_facts(parts: EngineParts) -> dict[str, Any]:
    spec = parts.spec
    return {
        "name": spec.name,
        "num_parameters": spec.num_parameters,
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "max_model_len": spec.max_model_len,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "quantization": spec.quantization or None,
        "kv_needed": _kv_needed(parts),
        "experts": None if spec.experts is None else spec.experts._asdict(),
    }


def _kv_needed(parts: EngineParts) -> dict[str, Any] | None:
    """What the longest request takes of the pool and what the model needs of it; None where that is the same."""
    spec, num_tokens = parts.spec, parts.max_model_len
    window = getattr(parts.engine.allocator, "sliding_window", None)
    stored = spec.kv_bytes_per_token * (num_tokens if window is None else min(window, num_tokens))
    needed = spec.needed_kv_bytes(num_tokens)
    if needed >= stored:
        return None
    return {
        "num_tokens": num_tokens,
        "stored_bytes": stored,
        "bytes": needed,
        "why": spec.kv_surplus_reasons(num_tokens),
    }
