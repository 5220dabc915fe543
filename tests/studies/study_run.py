"""Runs a study in this process, without Hydra's job around it."""

from pathlib import Path

from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.base import Findings
from kvarena.experiments.studies.cells import CellRunner


def run_study(out_dir: Path, *overrides: str) -> tuple[Findings, CellRunner]:
    # No probe of the machine beside each cell: 2.7 s of it, and what it says is not judged here.
    options = ["driver.probe=false", *overrides, "report.progress=false", "report.pages=false"]
    cells = CellRunner(options, out_dir)
    return instantiate(compose_cell(options)[0].study).run(cells), cells
