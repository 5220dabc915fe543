"""Records the runs that the simulator is calibrated from and judged by: a table of cells for each model.

    prompts of many lengths, mixed steps     run once and left out: a library looks for its kernels, Triton compiles
    the cells of calibration_cells.py        ordinary run folders, one a cell of a model, in the table's order

`kvarena make recordings keep` packs the folders (docs/simulator.md). A call that was cut off goes on where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvarena.engine.checks import check_number, require
from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.studies.base import Findings
from kvarena.experiments.studies.calibration_cells import (
    CELLS,
    MAX_NUM_SEQS,
    MIXED_STEPS,
    CalibrationCell,
    seeds,
    warm_up_lengths,
)
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, measured
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import MANIFEST_FILE

SHAPE = "-shape"  # ends the names of models whose positions can be as many as are asked for


@dataclass
class _Recorded:
    """What was recorded and what was left out, over all models."""

    claims: list[Claim] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class RecordStudy:
    """Runs the table of cells for each of `models`.

    Args:
        models: options of the group `model`.
        share: of each cell's requests, and of their lengths; below 1 to try it out.
        limit: seconds after which no cell starts. Each model has an equal part, and what those before it left.

    Raises:
        ConfigError: no model, or a number out of range.
    """

    def __init__(self, models: Sequence[str], share: float = 1.0, limit: float = 540.0) -> None:
        if not models or isinstance(models, str):
            raise ConfigError(f"study.models={models} must be a list of choices of model, such as study.models=[demo]")
        self._models = list(models)
        self._share = check_number("study.share", share, above=True)
        require(share <= 1, "study.share", share, "at most 1")
        self._limit = check_number("study.limit", limit)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found, start = _Recorded(), time.monotonic()
        for number, model in enumerate(self._models, 1):
            settings = [f"model={model}"]
            if model.endswith(SHAPE):
                settings.append("model.shape.max_position_embeddings=${engine.max_model_len}")
            self._record(cells, model, settings, start + self._limit * number / len(self._models), found)
        left_out = f"; left out, for want of time: {', '.join(found.skipped)}" if found.skipped else ""
        return Findings(
            title="Recordings for the simulator",
            headline=f"{len(found.claims)} of {len(CELLS) * len(self._models)} cells are recorded{left_out}.",
            source="experiments/studies/calibration_cells.py",
            claims=found.claims,
            notes=["`kvarena make recordings keep` packs the cells for experiment=calibrate (docs/simulator.md)."],
        )

    def _record(self, cells: CellRunner, model: str, settings: list[str], until: float, found: _Recorded) -> None:
        """The cells of one model, as long as the clock (`time.monotonic`) allows."""
        if time.monotonic() < until:
            self._warm_up(cells, settings)
        served: dict[str, float] = {}  # requests per second
        for cell, seed in zip(CELLS, seeds(CELLS), strict=True):
            name = f"{model}-{cell.name}"
            if time.monotonic() > until or (cell.of is not None and cell.of not in served):
                found.skipped.append(name)
                continue
            rate = None if cell.load is None else cell.load * served[str(cell.of)]
            summary = cells.run(name, [*settings, *cell.overrides(model, seed, rate, self._share)])
            served[cell.name] = rate_served(read_json(cells.folders[-1] / MANIFEST_FILE))
            tokens = summary["output_tokens_per_second"]
            print(f"{name}: {tokens:,.0f} output tokens/s, {summary['num_steps']:,} steps", file=sys.stderr, flush=True)
            note = f"{cell.part}; {summary['num_requests']} requests, {summary['num_steps']:,} steps"
            found.claims.append(measured(f"{name}: output tokens/s", "1/s", tokens, note=note))

    def _warm_up(self, cells: CellRunner, settings: list[str]) -> None:
        """Steps of all kinds: single prompts without a graph, then chunks beside few and many decodes."""
        config = cells.config(settings)
        spec, context = sizes_of(config).spec, config.engine.max_model_len
        longest = max(32, round(((spec.max_model_len if context is None else context) - 1) * self._share))
        alone = [(length, 1) for length in warm_up_lengths(spec.active_parameters, longest)]
        mixed = [(min(40 + 97 * i, longest - 24), max(2, round(24 * self._share))) for i in range(64)]
        if alone:
            rehearse(cells, [*settings, "arrival=closed_loop", "arrival.num_users=1"], alone, longest)
        for count, budget in MIXED_STEPS:
            rehearse(cells, settings, mixed[: max(1, round(count * self._share))], budget)


def rehearse(cells: CellRunner, settings: Sequence[str], lengths: Sequence[tuple[int, int]], budget: int) -> None:
    """Run requests of the given prompts and outputs, in tokens, at most `budget` of them a step, and leave nothing."""
    rows = [f"2026-11-30 00:00:00,{prompt},{output}" for prompt, output in lengths]
    with tempfile.TemporaryDirectory(prefix="kvarena-lengths-") as folder:
        trace = Path(folder) / "lengths.csv"
        trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
        cells.rehearse([
            *settings, "scheduler=chunked", f"scheduler.max_num_seqs={MAX_NUM_SEQS}",
            f"scheduler.max_num_batched_tokens={max(budget, MAX_NUM_SEQS)}", "workload=azure_trace",
            f"workload.path={trace}",
        ])  # fmt: skip


def rate_served(manifest: dict[str, Any]) -> float:
    """Requests per second of a run."""
    return float(manifest["workload"]["num_requests"] / manifest["run"]["wall_time"])


def cell_of(manifest: dict[str, Any]) -> CalibrationCell:
    """The table's cell that a run was. Raises ConfigError where it was none."""
    found = [cell for cell in CELLS if str(manifest["name"]).endswith(f"-{cell.name}")]
    if not found:
        raise ConfigError(f"{manifest['name']} is no cell of experiment=record")
    return max(found, key=lambda cell: len(cell.name))
