"""Sweeps: after `run.py -m`, one comparison report over all cells."""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.recording.files import CELL_FILE, ERROR_FILE, OVERRIDES_FILE, SWEEP_FILE

LEFT_OUT = {"overrides": ["text"], "error": "text", "not_defined": "true or false"}  # error.json of a cell


@dataclass
class EndedSweep:
    """What became of a sweep.

    Attributes:
        record: what sweep.json holds; empty when the sweep's folder could not be read.
        error: why there is no comparison; None where there is one, or no cell to compare.
    """

    record: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


# Hydra makes its callbacks itself, drops what a multirun returns and turns a callback's error into a warning, so there
# is no other way to hand the sweep to the command line's exit code.
ENDED_SWEEP: ContextVar[EndedSweep | None] = ContextVar("ENDED_SWEEP", default=None)


def collect(sweep_dir: Path, baseline: str | int | None) -> dict[str, Any]:
    """Write sweep.json: the finished runs under `sweep_dir` in job order, those not defined, and those that failed.

    Args:
        sweep_dir: holds one folder per job, named by its number.
        baseline: folder or name of the cell that the others are compared with (Hydra reads `1` as a number); None
            takes the first.

    Raises:
        ReportError: an error.json is broken.
    """
    from reports.files import read_json  # imported here: see `_compare`

    folders = sorted((d for d in sweep_dir.iterdir() if d.is_dir() and d.name.isdigit()), key=lambda d: int(d.name))
    errors = [folder / ERROR_FILE for folder in folders]
    ended = [
        read_json(path, LEFT_OUT, f"remove {path.parent} to run its cell again") for path in errors if path.exists()
    ]
    # Overrides that all cells share say nothing about one of them.
    overrides = [_overrides(folder) for folder in folders]
    for entry in ended:
        varying = [override for override in entry["overrides"] if not all(override in cell for cell in overrides)]
        entry["name"] = ", ".join(varying or entry["overrides"])
    sweep = {
        "runs": [d.name for d in folders if (d / CELL_FILE).exists()],
        "baseline": None if baseline is None else str(baseline),
        "not_defined": [entry for entry in ended if entry["not_defined"]],
        "failed": [entry for entry in ended if not entry["not_defined"]],
    }
    (sweep_dir / SWEEP_FILE).write_text(json.dumps(sweep, indent=2) + "\n")
    return sweep


def _overrides(folder: Path) -> list[str]:
    """What Hydra says that the cell's command line said; nothing of a folder without."""
    try:
        overrides = OmegaConf.load(folder / OVERRIDES_FILE)
    except (OSError, yaml.YAMLError):
        return []
    return [str(item) for item in overrides] if isinstance(overrides, ListConfig) else []


class ComparisonCallback(Callback):
    """Hydra callback: writes and prints the comparison when a multirun ends."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Compare the runs that finished; say which are not defined, and which failed."""
        ended = EndedSweep()
        ENDED_SWEEP.set(ended)
        try:
            _compare(Path(config.hydra.sweep.dir), config.report.baseline, ended)
        except Exception as error:
            ended.error = error


def _compare(sweep_dir: Path, baseline: str | int | None, ended: EndedSweep) -> None:
    # Hydra makes its callbacks before it checks the command line: a typing error must not wait for these.
    from rich.console import Console

    import reports.comparison
    import reports.terminal
    from experiments.output import print_result
    from experiments.recording.cell_state import only_writer

    with only_writer(sweep_dir):
        sweep = ended.record = collect(sweep_dir, baseline)
        summary = reports.comparison.write_comparison(sweep_dir) if sweep["runs"] else None
    result: dict[str, Any] = {"sweep_dir": str(sweep_dir)} | {key: sweep[key] for key in ("not_defined", "failed")}
    if summary is not None:
        Console().print(reports.terminal.comparison_table(summary))
        result |= {"report": str(sweep_dir / "report.html"), "summary": summary}
    print_result(result)
