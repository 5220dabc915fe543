"""Runs the study that a config names, writes study.json and its report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

import kvarena.reports.pages.ending
import kvarena.reports.pages.study
from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.lock import only_writer
from kvarena.experiments.folders.place import EXPERIMENT, check_place, is_finished
from kvarena.experiments.folders.provenance import git_state, machine, versions
from kvarena.experiments.recording.interruption import Interrupted, Signals, shown, whole_cells
from kvarena.experiments.settings.command_line import command_of
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.base import Study
from kvarena.experiments.studies.cells import CellRunner
from kvarena.reports.pages.study_claims import study_table, tally
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import CELL_FILE, MANIFEST_FILE, STUDY_FILE
from kvarena.reports.reading.writing import write_text

SCHEMA_VERSION = 3  # 2 had no counts of the claims


def run_study(config: RunConfig, on_start: Callable[[Path], None]) -> None:
    """Run section `study` of the config and print what it came to.

    Args:
        config: of the experiment.
        on_start: called with the experiment's folder where this run is to be the one that is in it.

    Raises:
        KvarenaError: a bad setting or a failed cell.
    """
    hydra = HydraConfig.get()
    out_dir = Path(hydra.runtime.output_dir)
    if config.driver.record == "none":
        raise ConfigError("driver.record=none records nothing that an experiment could look at; use full or summary")
    experiment = hydra.runtime.choices.get("experiment")
    check_place(out_dir, EXPERIMENT, experiment)
    study: Study = instantiate(config.study)
    if not is_finished(out_dir):
        with only_writer(out_dir):
            on_start(out_dir)
    cells = CellRunner(hydra.overrides.task, out_dir, command_of(hydra, alone=True))
    with Signals():
        try:
            findings = study.run(cells)
        except Interrupted as stopped:
            raise Interrupted(stopped.number, _kept(cells, stopped)) from None
    content = findings.to_json()
    record = content | {
        "schema_version": SCHEMA_VERSION,
        **tally(content["claims"]),
        "experiment": experiment,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(),
        "versions": versions(),
        "command": command_of(hydra, alone=hydra.mode is RunMode.MULTIRUN),
        "conditions": conditions(cells.folders),
        "cells": [str(folder.relative_to(out_dir)) for folder in cells.folders],
    }
    with only_writer(out_dir):
        on_start(out_dir)
        write_text(out_dir / STUDY_FILE, json.dumps(record, indent=2, default=str) + "\n")
        summary = kvarena.reports.pages.study.write_study_report(out_dir)
    Console().print(study_table(summary))
    if hydra.mode is not RunMode.MULTIRUN:  # a sweep has a last line of its own
        kvarena.reports.pages.ending.print_ending(
            kvarena.reports.pages.ending.study_ending(out_dir, summary), full=config.report.json == "full"
        )


def _kept(cells: CellRunner, stopped: Interrupted) -> str:
    """What an experiment that a signal ended leaves."""
    folder = shown(cells.out_dir)
    whole = len({cell for cell in cells.folders if (cell / CELL_FILE).exists()})
    return f"{whole_cells(whole, folder)}; of the cell that ran {stopped.kept}"


def conditions(folders: Sequence[Path]) -> dict[str, Any]:
    """Under which conditions the cells ran, as their manifests tell.

    Returns:
        `simulated`: whether a cell was; `profiles`: name, source and error of every profile that timed one; `seeds`: of
        the cells' workloads, each once.
    """
    profiles: dict[str, dict[str, Any]] = {}
    seeds: set[int] = set()
    for folder in folders:
        manifest = read_json(folder / MANIFEST_FILE)
        simulation = manifest.get("simulation")
        if simulation:
            figures = simulation.get("figures") or simulation
            name = Path(simulation["profile"]).name  # a profile may be a file of this machine
            profiles[name] = {"name": name, "source": figures.get("source"), "error": figures.get("error")}
        seed = manifest["config"]["workload"].get("seed")
        if seed is not None:
            seeds.add(int(seed))
    return {"simulated": bool(profiles), "profiles": list(profiles.values()), "seeds": sorted(seeds)}
