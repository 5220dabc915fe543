"""The main job: build what the config says, run it, write the run's files and its report."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import reports.run_report
import reports.terminal
from engine.gpu_memory import NO_GPU
from engine.models import ModelSpec
from experiments.building.build import build
from experiments.building.shared import SharedParts
from experiments.building.warm_up import warm_cache, warm_up
from experiments.compose import NAMING_GROUPS
from experiments.config import ReportConfig, SweepConfig, check_values
from experiments.explain import first_line
from experiments.http_job import run_http
from experiments.load.driver import drive
from experiments.output import HttpProgress, Progress, print_result
from experiments.recording.cell_state import cell_key, is_finished, mark_finished, only_writer
from experiments.recording.files import ERROR_FILE, MANIFEST_FILE
from experiments.recording.provenance import git_state, machine, peak_rss_bytes, utc_now, versions
from experiments.recording.recording import Recording, recording_warning
from experiments.recording.tracking import TrackedRun, Tracker, tracked_run

SCHEMA_VERSION = 1


def run_job(cfg: DictConfig) -> None:
    """Run one cell and print where its report is.

    Raises:
        KvarenaError: a bad setting or a failed run.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    choices = {group: hydra.runtime.choices[group] for group in NAMING_GROUPS}
    group = str(run_dir.parent) if hydra.mode is RunMode.MULTIRUN else None
    summary = execute(cfg, run_dir, f"{choices['allocator']} x {choices['scheduler']}", choices, group)
    report = run_dir / "report.html" if cfg.report.pages else None
    console = Console()
    console.print(reports.terminal.run_table(summary))
    if report is not None:
        console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    print_result({"run_dir": str(run_dir), "report": report and str(report), "summary": summary})


def record_failure(message: str, *, not_defined: bool) -> None:
    """Leave `message` in the cell's folder, where a sweep's comparison finds it.

    Args:
        message: why the cell did not run.
        not_defined: its settings mean nothing together.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    path = Path(hydra.runtime.output_dir) / ERROR_FILE
    path.write_text(json.dumps({"overrides": overrides, "error": message, "not_defined": not_defined}) + "\n")


def execute(
    cfg: DictConfig,
    run_dir: Path,
    name: str,
    choices: dict[str, str],
    group: str | None = None,
    shared: SharedParts | None = None,
) -> dict[str, Any]:
    """Run one cell into `run_dir`, unless it is finished there, and return its report's summary.

    Waits while another process runs a cell there.

    Args:
        cfg: the resolved config, without the hydra node.
        run_dir: an existing folder.
        name: how the cell is called in reports.
        choices: the config groups' chosen options (`allocator`, `scheduler`, `workload`, `arrival`).
        group: the sweep or experiment that the cell belongs to, for a tracker.
        shared: model and runner of the cells that run in this process, one after the other; None: its own.
    """
    check_values(cfg)
    report, sweep = ReportConfig.from_config(cfg.report), SweepConfig.from_config(cfg.sweep)
    tracker: Tracker | None = instantiate(cfg.tracking)
    key = cell_key(cfg, choices)
    with only_writer(run_dir):
        if is_finished(run_dir, key, allow_mixed=sweep.allow_mixed):
            print(f"{name}: finished before, in {run_dir}", file=sys.stderr)
            if report.pages and not (run_dir / "report.html").exists():  # it ran without pages
                return reports.run_report.write_run_report(run_dir)
            return reports.run_report.read_summary(run_dir)
        if cfg.target is None:
            facts = _run_here(cfg, run_dir, name, shared)
        else:
            facts = run_http(cfg, run_dir, lambda count: HttpProgress(name, count, report.progress))
        manifest = _manifest(cfg, name, choices) | facts
        manifest["workload"] = {"name": choices["workload"]} | manifest["workload"]
        (run_dir / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, default=str) + "\n")
        write = reports.run_report.write_run_report if report.pages else reports.run_report.write_summary
        summary = write(run_dir)
        mark_finished(run_dir, key)
    if summary["num_failed"]:
        example = next(kind["example"] for kind in summary["rejections"] if kind["finish_reason"] == "error")
        failed = f"{summary['num_failed']} of {summary['num_requests']} requests failed"
        print(f"warning: {name}: {failed}, such as by: {example}", file=sys.stderr)
    if tracker is not None:
        _track(tracker, tracked_run(name, group, manifest["config"], summary, run_dir), run_dir)
    return summary


def _track(tracker: Tracker, run: TrackedRun, run_dir: Path) -> None:
    """Tell the tracker; whatever it raises, the run's own files are complete."""
    try:
        tracker.log(run, run_dir)
    except Exception as error:
        reason = f"the tracker did not take the run ({first_line(error)})"
        print(f"warning: {reason}; its files are in {run_dir}", file=sys.stderr)


def _run_here(cfg: DictConfig, run_dir: Path, name: str, shared: SharedParts | None) -> dict[str, Any]:
    """Run the cell on this process's engine; write its Parquet files and return what the manifest says of it."""
    setup = build(cfg, shared)
    warmup_time = 0.0
    if setup.driver.warmup and setup.parts.simulator is None:
        warmup_time = warm_up(cfg, setup.parts, [next(iter(setup.load.requests)).sampling])
    if setup.driver.cache == "warm":
        warmup_time += warm_cache(cfg, setup.parts, setup.load.requests)
    simulator = setup.parts.simulator
    progress = Progress(name, len(setup.load.requests), bool(cfg.report.progress))
    # A simulated run may have a million requests; in one that computes nothing is made while it is measured.
    requests = list(setup.load.requests) if simulator is None else setup.load.requests
    recording = Recording(
        setup.parts.engine, level=setup.driver.record, kv_map=bool(cfg.report.kv_map),
        scores=setup.driver.scores > 0, measured=simulator is None,
    )  # fmt: skip
    gpu, model = setup.parts.gpu_memory, setup.parts.model
    if gpu is not None and model is not None:
        gpu.begin(model.module)
    # The host's garbage collector would show as pauses of single steps: collect now, then only by reference counts.
    gc.collect()
    gc.freeze()
    try:
        setup.parts.clock.reset()
        with recording:
            drive(
                setup.parts.engine, requests, recording, closed_loop=setup.load.closed_loop, on_progress=progress,
                after_step=None if simulator is None else simulator.after_step,
            )  # fmt: skip
    finally:
        gc.unfreeze()
        progress.finish(recording)
    ended = utc_now()
    recording.write(run_dir)
    run = recording.facts()
    if simulator is None and (slow := recording_warning(run)) is not None:
        print(f"warning: {name}: {slow}", file=sys.stderr)
    return setup.load.manifest() | {
        "model": _model_facts(setup.parts.spec),
        "pool": setup.parts.pool_facts,
        "simulation": setup.parts.simulation_facts,
        "memory": NO_GPU if gpu is None else gpu.parts(),
        "run": run
        | {
            "ended": ended,
            "peak_rss_bytes": peak_rss_bytes(),
            # A virtual clock waits for its driver: nothing is late.
            "lateness_bound": setup.driver.max_lateness if simulator is None else None,
            "warmup_time": warmup_time,
        },
    }


def _manifest(cfg: DictConfig, name: str, choices: dict[str, str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": utc_now("seconds"),
        "strategy": {
            "allocator": choices["allocator"],
            "scheduler": choices["scheduler"],
            "details": _options(cfg.allocator) | _options(cfg.scheduler),
        },
        "arrival": {"name": choices["arrival"]} | _options(cfg.arrival),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "git": git_state(),
        "machine": machine(),
        "versions": versions(),
    }


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "num_parameters": spec.num_parameters,
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "max_model_len": spec.max_model_len,
        "dtype": str(spec.dtype).removeprefix("torch."),
    }


def _options(section: DictConfig) -> dict[str, Any]:
    """A strategy's options as plain values."""
    options: dict[str, Any] = OmegaConf.to_container(section, resolve=True)  # type: ignore[assignment]
    return {key: value for key, value in options.items() if key != "_target_"}
