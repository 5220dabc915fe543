"""How far are profiles off that were fitted to nothing here? Recorded cells on an H200 beside tables of operations.

    recorded cell --> device seconds of its steps, output tokens/s
                  --> the same steps by the tables                      error of the device seconds
                  --> the same requests simulated by the tables         error of the throughput
                  --> both by the profile that was fitted to such runs  beside it
    steps on one card --> a card's share of the bandwidth and gap  --> steps on two cards, which it has not seen

The host's times are those of the fitted profile under both: what a host takes is no table's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.simulation.collectives import ONE_CARD, Ranks
from kvarena.experiments.simulation.fit import predict, samples
from kvarena.experiments.simulation.profiles import Card, MeasuredProfile, load_profile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.recordings import make_folders, recording_names
from kvarena.experiments.simulation.rerun import throughput_again
from kvarena.experiments.simulation.step_time import StepTime
from kvarena.experiments.simulation.table_profile import TablesProfile
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, at_most, check, measured, near
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run

BAR = 10.0  # percent
CONTEXT = 1024
# ms a decode step at 1, 32 and 256 (128) requests with a context of 1,024, vLLM 0.26 on two H200s, by tensor parallel;
# of two such pairs.
TWO_CARDS: dict[str, dict[int, tuple[float, ...]]] = {
    "llama-3.1-8b-shape": {1: (3.32, 3.53), 32: (4.07, 4.28), 256: (10.00, 10.60)},
    "llama-3.1-70b-shape": {1: (20.26,), 32: (22.00,), 128: (29.65,)},
}
# ms a decode step of this engine, by requests, at a mean context of 1,024: on one H200, and over two by tensor parallel
# (docs/parallel.md, Measured; of the small shape README.md).
OWN_ONE: dict[str, dict[int, float]] = {
    "llama-3.1-8b-shape": {1: 4.04, 32: 5.21, 256: 14.95},
    "qwen3-0.6b-shape": {1: 0.742, 32: 1.711, 256: 8.45},
}
OWN_TWO: dict[str, dict[int, float]] = {
    "llama-3.1-8b-shape": {1: 2.59, 32: 3.18, 256: 8.70},
    "llama-3.1-70b-shape": {1: 18.31, 32: 20.04, 128: 27.70},
}
OWN_BAR = 8.0  # percent
SHARES, GAPS = np.arange(0.60, 0.96, 0.01), np.arange(0.0, 31e-6, 1e-6)


@dataclass(frozen=True)
class Error:
    """One recorded cell: signed errors in percent, of the tables and of the fitted profile.

    Attributes:
        label: in the report.
        fitted_to_it: whether the fitted profile has seen it.
        device: of the seconds of all its steps.
        throughput: of output tokens/s.
        measured: output tokens/s.
    """

    label: str
    fitted_to_it: bool
    device: tuple[float, float]
    throughput: tuple[float, float]
    measured: float


@dataclass
class ProfileErrorStudy:
    """Tables of operations against recorded cells, and against others' steps on two cards.

    Args:
        recordings: a folder of recordings.
        tables: a profile of tables.
        fitted: by model, the profile that was fitted to its recordings.
        card: of which two figures are fitted to steps on one card.

    Raises:
        ConfigError: no recordings, or a profile of another kind.
    """

    recordings: str
    tables: str
    fitted: dict[str, str]
    card: str

    def __post_init__(self) -> None:
        recording_names(Path(self.recordings))

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        tables = load_profile(self.tables)
        if not isinstance(tables, TablesProfile):
            raise ConfigError(f"study.tables={self.tables} must be a profile of tables (kvarena make profile)")
        found = []
        for folder in make_folders(Path(self.recordings), cells.out_dir / "runs"):
            run = RecordedRun.read(folder)
            model = run.manifest["model"]["name"]
            if run.overlap and model in self.fitted:
                found.append(self._error(run, model, tables, cells))
        held_out = [one for one in found if not one.fitted_to_it]
        device, rate = (
            float(np.mean([abs(errors[0]) for errors in of])) if of else 0.0
            for of in ([one.device for one in held_out], [one.throughput for one in held_out])
        )
        within = sum(abs(one.throughput[0]) <= BAR for one in held_out)
        return Findings(
            title="Step times from published tables, against recorded cells on one H200",
            headline=f"Fitted to nothing, the tables are within {BAR:g} % of the measured output tokens/s in {within} "
            f"of {len(held_out)} held-out cells; mean error {rate:.1f} %, of device seconds {device:.1f} %.",
            source=f"Recorded cells of experiment=record; {tables.source}. Steps on two cards: vLLM 0.26 on two H200s.",
            claims=[*self._claims(found), *self._two_cards(tables, cells), *self._own(cells)],
            charts=[_chart(found)],
            beside="the profile fitted to such runs",
            differences=[
                "The tables are of another engine's kernels (see the source), and of each alone: what lies between "
                "two of one CUDA graph is in none of them.",
                "Decodes count with their mean context; that of decodes beside prompts is told from the step's totals.",
            ],
            notes=[
                "Device seconds: the sum over all steps of a cell whose device time is known, with overlap.",
                "Both profiles have the same host, that of the fitted one: a card's tables hold no host.",
                "Fitted to: cells that the fitted profile has seen; the tables have seen none.",
            ],
        )

    def _error(self, run: RecordedRun, model: str, tables: TablesProfile, cells: CellRunner) -> Error:
        fitted = load_profile(self.fitted[model])
        assert isinstance(fitted, MeasuredProfile)
        sizes, block_size = _sizes(cells, f"{model}-shape"), int(run.manifest["config"]["allocator"]["block_size"])
        by_tables = tables.step_time(sizes, block_size)
        steps = samples(run, fitted.host.max_launch_tokens, fitted.decode).timed()
        ours = np.array([by_tables(StepFeatures(*row)) for row in steps.features.tolist()])
        seconds = [float(values.sum()) for values in (ours, predict(fitted, steps))]
        measured_rate = float(summarize(read_run(run.path))["output_tokens_per_second"])
        rates = [throughput_again(run, one, fitted.host) for one in (by_tables, fitted.device)]
        return Error(
            f"{model}, {run.path.name.removeprefix(f'{model}-')}",
            run.manifest["calibration"]["part"] != "held-out",
            _errors(seconds, float(steps.device.sum())),
            _errors(rates, measured_rate),
            measured_rate,
        )

    def _claims(self, found: Sequence[Error]) -> list[Claim]:
        claims = []
        for one in found:
            note = "fitted to" if one.fitted_to_it else ""
            for name, (ours, beside) in (("tokens/s", one.throughput), ("device seconds", one.device)):
                more: dict[str, Any] = {"note": f"{ours:+.1f} %{', ' * bool(note)}{note}", "beside": abs(beside)}
                quantity = f"{one.label}: error in {name}"
                if one.fitted_to_it:
                    claims.append(measured(quantity, "%", abs(ours), **more))
                else:
                    claims.append(check(at_most(quantity, "%", BAR, abs(ours), **more)))
        return claims

    def _two_cards(self, tables: TablesProfile, cells: CellRunner) -> list[Claim]:
        claims = []
        for model, stated in TWO_CARDS.items():
            step_time: StepTime = tables.step_time(_sizes(cells, model), 16, 0.0, Ranks(2, 1))
            for requests, times in stated.items():
                ours = 1e3 * step_time(_decode(requests))
                quantity = f"{model}, two cards by tensor parallel, {requests} requests: decode step"
                note = f"vLLM on two pairs: {', '.join(f'{one:.2f}' for one in times)} ms, with its host"
                claims.append(near(quantity, "ms", times[0], ours, 0.08, note=note))
        return claims

    def _own(self, cells: CellRunner) -> list[Claim]:
        """This engine's steps: the card as it is fitted to those on one card, and what it says of those on two."""
        card = load_profile(self.card)
        if not isinstance(card, Card):
            raise ConfigError(f"study.card={self.card} must be a card, such as h200")
        sizes = {model: _sizes(cells, model) for model in OWN_ONE | OWN_TWO}

        def errors(card: Card, steps: dict[str, dict[int, float]], ranks: Ranks) -> list[tuple[str, int, float]]:
            return [
                (model, requests, 100 * (1e3 * time(_decode(requests)) / ms - 1))
                for model, of in steps.items()
                for time in (card.step_time(sizes[model], 16, 0.0, ranks),)
                for requests, ms in of.items()
            ]

        made = (
            replace(card, bandwidth_efficiency=float(share), layer_gap=float(gap)) for share in SHARES for gap in GAPS
        )
        best = min(made, key=lambda one: sum(error**2 for _, _, error in errors(one, OWN_ONE, ONE_CARD)))
        figures = f"share of the bandwidth {best.bandwidth_efficiency:.2f}, gap a layer {1e6 * best.layer_gap:.0f} us"
        claims = [
            measured(f"{model}, one card, {requests} requests: error of the fitted card's step", "%", abs(error),
                     note=f"{error:+.1f} %, fitted to; {figures}")
            for model, requests, error in errors(best, OWN_ONE, ONE_CARD)
        ]  # fmt: skip
        for model, requests, error in errors(best, OWN_TWO, Ranks(2, 1)):
            quantity = f"{model}, two cards, {requests} requests: error of the card fitted to one"
            note = f"{error:+.1f} % of {OWN_TWO[model][requests]} ms"
            claims.append(check(at_most(quantity, "%", OWN_BAR, abs(error), note=note)))
        return claims


def _decode(requests: int) -> StepFeatures:
    return StepFeatures(0, requests, requests * CONTEXT, 0, 0, 0)


def _sizes(cells: CellRunner, model: str) -> ModelSizes:
    return sizes_of(cells.config([f"model={model}", "runner=simulated", "engine.dtype=bfloat16"]))


def _errors(ours: Sequence[float], measured_value: float) -> tuple[float, float]:
    one, other = (100 * (value / measured_value - 1) for value in ours)
    return one, other


def _chart(found: Sequence[Error]) -> Chart:
    rates = [one.measured for one in found]
    series = [
        Series(name, rates, [one.measured * (1 + one.throughput[place] / 100) for one in found])
        for place, name in enumerate(("tables of operations", "fitted to such runs"))
    ]
    caption = "Output tokens/s of the recorded cells, measured and simulated, both with the fitted profile's host; the "
    caption += "fitted profile has seen some of them (the table says which), the tables none."
    x, y = "output tokens/s, measured", "output tokens/s, simulated"
    return Chart("throughput", "parity", x, y, caption, series, log_x=True, log_y=True)
