"""Calibrates the simulator: profiles from recorded runs, judged on runs that were held out.

    study.train --fit--> profiles/*.yaml --simulate the workloads of study.test--> cells/* --> errors per cell
                                                            '--> decisions under the simulated clock, against recorded
    study.test  --replay with the recorded times--> decisions identical in N of N steps

`study.recordings` stands for both lists: a folder of recordings, whose manifests say which cells were held out. The
bars are the project's: 3 % in throughput and mean latency, 8 % in the 99th percentiles of TTFT and TPOT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.divergence import Divergence, compare_decisions
from kvarena.experiments.simulation.fit import Fit, fit_profile, predict, samples
from kvarena.experiments.simulation.profiles import write_profile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.recordings import make_folders, recording_names
from kvarena.experiments.simulation.replay import ReplayResult, replay
from kvarena.experiments.simulation.rerun import simulate_again
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Verdict, at_most, check
from kvarena.reports.pages.run_report import write_summary
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run

MAX_POINTS = 400  # of a cell in the figure
HELD_OUT = "held-out"  # a recording's word for the cells that judge
NOTES = (
    "The simulator is given the requests of the held-out cells and their scheduled arrivals, and nothing that was "
    "measured on them.",
    "Where arrivals set the throughput, it is printed and not judged: any simulator that keeps up has it right.",
    "Decisions: a digest per step of who computes which positions, of preemptions and slots. Replayed: the recorded "
    "run with its own step times (experiments/simulation/replay.py). Under the simulated clock: the simulated run, "
    "whose step N is compared with the recorded step N (experiments/simulation/divergence.py).",
)


class Metric(NamedTuple):
    """What the simulator is judged by.

    Attributes:
        name: in the report.
        key: in summary.json.
        statistic: of a distribution; None for a plain number.
        bar: largest error, in percent.
    """

    name: str
    key: str
    statistic: str | None
    bar: float

    def of(self, summary: dict[str, Any]) -> float:
        """Its value in a run's summary."""
        value = summary[self.key]
        return float(value if self.statistic is None else value[self.statistic])


METRICS = (
    Metric("output tokens/s", "output_tokens_per_second", None, 3.0),
    Metric("mean latency", "e2e_seconds", "mean", 3.0),
    Metric("p99 TTFT", "ttft_seconds", "p99", 8.0),
    Metric("p99 TPOT", "tpot_seconds", "p99", 8.0),
)


@dataclass(frozen=True)
class Cell:
    """One held-out run beside its simulation.

    Attributes:
        label: in the report.
        overlap: whether steps were planned while others ran.
        errors: of METRICS, signed, in percent.
        measured, simulated: of METRICS.
        steps: measured and predicted device seconds of its steps.
        decisions: of its replay.
        divergence: its decisions under the simulated clock.
        tests_throughput: whether the engine sets the throughput, and not the arrivals.
        at_once: whether all requests are there from the start, so that no arrival can fall between other steps.
    """

    label: str
    overlap: bool
    errors: list[float]
    measured: list[float]
    simulated: list[float]
    steps: tuple[np.ndarray, np.ndarray]
    decisions: ReplayResult
    divergence: Divergence
    tests_throughput: bool
    at_once: bool


class CalibrateStudy:
    """Fits a profile for each model and loop among `train`, and judges it on the runs of `test` of the same.

    Args:
        train: run folders to fit.
        test: run folders to judge by.
        recordings: a folder of recordings in place of both lists; the run folders are made in the study's.

    Raises:
        ConfigError: no runs, a run in both lists, or a test run without a training run of its model and loop.
    """

    def __init__(self, train: Sequence[str] = (), test: Sequence[str] = (), recordings: str | None = None) -> None:
        if recordings is not None and (train or test):
            raise ConfigError(
                "study.recordings stands for study.train and study.test; give these two with study.recordings=null"
            )
        self._recordings = None if recordings is None else Path(recordings)
        if self._recordings is None:
            self._take(train, test)
        else:
            recording_names(self._recordings)

    def _take(self, train: Sequence[str | Path], test: Sequence[str | Path]) -> None:
        """Read and check the runs of both lists."""
        for name, folders in (("train", train), ("test", test)):
            if not folders:
                raise ConfigError(f"study.{name} is empty; give run folders: 'study.{name}=[DIR,DIR]'")
        both = {Path(folder).resolve() for folder in train} & {Path(folder).resolve() for folder in test}
        if both:
            raise ConfigError(f"{min(both)} is in study.train and in study.test; a run cannot judge its own fit")
        self._train = [RecordedRun.read(folder) for folder in train]
        self._test = [RecordedRun.read(folder) for folder in test]
        missing = {_group(run) for run in self._test} - {_group(run) for run in self._train}
        if missing:
            raise ConfigError(f"study.train has no run of {min(missing)}, which study.test has")

    def run(self, cells: CellRunner) -> Findings:
        """Fit, simulate, replay and compare."""
        if self._recordings is not None:
            folders = make_folders(self._recordings, cells.out_dir / "runs")
            held_out = [_part(folder) == HELD_OUT for folder in folders]
            self._take(
                [folder for folder, held in zip(folders, held_out, strict=True) if not held],
                [folder for folder, held in zip(folders, held_out, strict=True) if held],
            )
        fits: dict[str, Fit] = {}
        (cells.out_dir / "profiles").mkdir(parents=True, exist_ok=True)
        for group in sorted({_group(run) for run in self._train}):
            fits[group] = fit_profile([run for run in self._train if _group(run) == group])
        found = [self._judge(run, fits[_group(run)], cells) for run in self._test]
        for group, fit in fits.items():
            judged = [cell for cell, run in zip(found, self._test, strict=True) if _group(run) == group]
            profile = replace(fit.profile, error=_error(judged))
            write_profile(profile, cells.out_dir / "profiles" / f"{group}.yaml")
        return _findings(found, fits)

    def _judge(self, run: RecordedRun, fit: Fit, cells: CellRunner) -> Cell:
        """Simulate one held-out run and set it beside its measurement."""
        group = _group(run)
        folder = cells.out_dir / "cells" / run.path.name
        cells.folders.append(folder)
        simulated_steps = simulate_again(run, fit.profile, f"profiles/{group}.yaml", folder)
        simulated, measured = write_summary(folder), summarize(read_run(run.path))
        values = [[metric.of(summary) for metric in METRICS] for summary in (measured, simulated)]
        steps = samples(run, fit.profile.host.max_launch_tokens, fit.profile.decode).timed()
        return Cell(
            label=_label(run),
            overlap=run.overlap,
            errors=[(ours / stated - 1) * 100 for stated, ours in zip(*values, strict=True)],
            measured=values[0],
            simulated=values[1],
            steps=(steps.device, predict(fit.profile, steps)),
            decisions=replay(run),
            divergence=compare_decisions(run.steps, simulated_steps),
            tests_throughput=_tests_throughput(run),
            at_once=run.manifest["arrival"]["name"] == "all_at_once",
        )


def _group(run: RecordedRun) -> str:
    """Runs of one profile: the model, and whether steps overlapped. A file's name."""
    model = re.sub(r"[^A-Za-z0-9.]+", "-", run.manifest["model"]["name"])
    return f"{model}-{'overlap' if run.overlap else 'plain'}"


def _part(folder: Path) -> str:
    """What a cell of a recording is for."""
    return str(RecordedRun.read(folder).manifest["calibration"]["part"])


def _tests_throughput(run: RecordedRun) -> bool:
    """Whether more was asked of the engine than it served: all requests at once, or arrivals above its rate."""
    load = run.manifest.get("calibration", {}).get("load")
    return run.manifest["arrival"]["name"] in ("all_at_once", "closed_loop") or (load is not None and load > 1)


def _error(cells: Sequence[Cell]) -> str:
    """The largest errors of the cells that judge a profile, as it carries them."""
    if not cells:
        return "not judged: no run was held out"
    worst = [max(abs(error) for error in errors) if errors else None for errors in _judged(cells)]
    largest = [
        f"{error:.1f} % in {metric.name}" for metric, error in zip(METRICS, worst, strict=True) if error is not None
    ]
    return f"at most {', '.join(largest)}, over {len(cells)} held-out cells"


def _judged(cells: Sequence[Cell]) -> list[list[float]]:
    """Per metric the errors that count."""
    return [
        [cell.errors[i] for cell in cells if metric.statistic is not None or cell.tests_throughput]
        for i, metric in enumerate(METRICS)
    ]


def _label(run: RecordedRun) -> str:
    if "calibration" in run.manifest:
        return f"{run.manifest['model']['name']}, {run.manifest['name']}"
    arrival = run.manifest["arrival"]
    load = f"{arrival['rate']:.3g} requests/s" if "rate" in arrival else arrival["name"].replace("_", " ")
    return f"{run.manifest['model']['name']}{', overlap' if run.overlap else ''}, {load}"


def _findings(cells: Sequence[Cell], fits: dict[str, Fit]) -> Findings:
    claims = [claim for cell in cells for claim in _claims(cell)]
    held = sum(claim.verdict is Verdict.PASSES for claim in claims)
    identical = sum(cell.decisions.num_identical for cell in cells)
    total = sum(cell.decisions.num_steps for cell in cells)
    judged = sum(claim.verdict in (Verdict.PASSES, Verdict.FAILS) for claim in claims)
    same, at_once = (
        sum(cell.divergence.num_same for cell in part) / max(1, sum(cell.divergence.num_steps for cell in part))
        for part in (cells, [cell for cell in cells if cell.at_once])
    )
    return Findings(
        title="Fidelity of the simulator on held-out runs",
        headline=f"{held} of {judged} bars are met in {len(cells)} held-out cells; errors: {_error(cells)}. Replayed "
        f"with the recorded times, decisions are identical in {identical:,} of {total:,} steps; under the simulated "
        f"clock {same:.1%} of the steps decide the same ({at_once:.1%} where all requests come at once).",
        source="bars of the project: 3 % in throughput and mean latency, 8 % in p99 TTFT and p99 TPOT",
        claims=claims,
        charts=[chart for loop in (False, True) for chart in _charts([c for c in cells if c.overlap is loop])],
        notes=[*map(_fit_note, fits, fits.values()), *map(_steps_note, cells), *map(_clock_note, cells), *NOTES],
    )


def _fit_note(group: str, fit: Fit) -> str:
    return (
        f"profiles/{group}.yaml: {fit.num_steps:,} steps of {fit.profile.source}. A fitted step's device time is off "
        f"by {fit.error[0]:.1%} in the median and {fit.error[1]:.1%} at the 90th percentile."
    )


def _steps_note(cell: Cell) -> str:
    measured, predicted = cell.steps
    return (
        f"{cell.label}, its {len(measured):,} steps by the fitted profile: device time off by "
        f"{np.median(np.abs(predicted / measured - 1)):.1%} in the median, {predicted.sum() / measured.sum() - 1:+.1%} "
        "in sum."
    )


def _clock_note(cell: Cell) -> str:
    return f"{cell.label}, under the simulated clock: {cell.divergence}."


def _claims(cell: Cell) -> list[Claim]:
    claims = []
    for metric, error, measured, simulated in zip(METRICS, cell.errors, cell.measured, cell.simulated, strict=True):
        note = f"measured {measured:.4g}, simulated {simulated:.4g} ({error:+.1f} %)"
        claim = at_most(f"{cell.label}: error in {metric.name}", "%", metric.bar, abs(error), note=note)
        if metric.statistic is None and not cell.tests_throughput:
            claim = replace(claim, verdict=Verdict.NOT_COMPARABLE, note=f"{note}; set by the arrivals")
        claims.append(claim)
    result = cell.decisions
    share = 100 * (1 - result.num_identical / result.num_steps)
    claims.append(at_most(f"{cell.label}: steps that decide otherwise", "%", 0.0, share, note=str(result)))
    return [check(claim) for claim in claims]  # the bars are the project's own


def _charts(cells: Sequence[Cell]) -> list[Chart]:
    """Of the cells of one loop; none without cells."""
    if not cells:
        return []
    loop = "overlap" if cells[0].overlap else "plain"
    told = f"engine.overlap={str(cells[0].overlap).lower()}"
    return [_error_chart(cells, loop, told), _step_chart(cells, loop, told)]


def _error_chart(cells: Sequence[Cell], loop: str, told: str) -> Chart:
    models = {cell.label.partition(", ")[0] for cell in cells}
    labels = [cell.label.partition(", ")[2] if len(models) == 1 else cell.label.replace(", ", "\n") for cell in cells]
    return Chart(
        name=f"errors-{loop}",
        kind="bars",
        x_label="held-out cell",
        y_label="error, %",
        caption=f"Error of the simulator per held-out cell, {told}. To be met: 3 % in throughput and mean latency, 8 % "
        "in the percentiles.",
        series=[Series(metric.name, labels, [cell.errors[i] for cell in cells]) for i, metric in enumerate(METRICS)],
    )


def _step_chart(cells: Sequence[Cell], loop: str, told: str) -> Chart:
    series = []
    for cell in cells:
        measured, predicted = (column * 1e3 for column in cell.steps)
        chosen = np.linspace(0, len(measured) - 1, min(MAX_POINTS, len(measured))).astype(int)
        series.append(Series(cell.label, measured[chosen].tolist(), predicted[chosen].tolist()))
    return Chart(
        name=f"steps-{loop}",
        kind="parity",
        x_label="measured device time of a step, ms",
        y_label="by the fitted profile, ms",
        caption=f"Device time of single steps of the held-out cells, {told}: measured across, by the fitted profile "
        "up. On the line both are equal.",
        series=series,
        log_x=True,
        log_y=True,
    )
