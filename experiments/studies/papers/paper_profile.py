"""Fits a card's host times to the step times that PagedAttention's own bars imply.

    Figure 13, vLLM's bars --Little's law--> seconds a step:  batch / (requests per second * output tokens a request)
    card + host.before + host.before_per_request * batch --> the same two step times, measured in simulated cells

Two numbers fix two parameters; nothing else of the paper is looked at. What the profile then says of the paper's other
figures is judged by the experiments that run under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.simulation.profiles import Card, load_profile
from kvarena.experiments.simulation.step_time import HostTime
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, fitted, measured
from kvarena.experiments.studies.orca import Load, run_system, steady
from kvarena.experiments.studies.papers.published import FIGURE_13, FIGURE_13_SOURCE, MEAN_OUTPUTS
from kvarena.reports.analysis.memory import step_spans
from kvarena.reports.reading.files import read_run
from kvarena.reports.reading.writing import write_text

MS = 1e3
BATCHES = np.array([bars["vLLM"] for bars in FIGURE_13.values()])
DAMPING = 0.5


@dataclass(frozen=True)
class PaperProfileStudy:
    """Args:
    card: profile whose device times are kept and whose host times are fitted.
    num_requests: workload -> how many arrive, for each of the loads of Figure 13.
    seeds: of the workload.
    close: the fit ends when both step times are met within this share.
    max_rounds: most rounds of cells until then.

    Raises:
        ConfigError: the profile is no card, or fewer than two loads, one seed, or one round.
    """

    card: str
    num_requests: dict[str, int]
    seeds: Sequence[int]
    close: float
    max_rounds: int

    def __post_init__(self) -> None:
        if not isinstance(load_profile(self.card), Card):
            raise ConfigError(f"study.card={self.card} must be a card's profile: a100-40gb, h100, ...")
        if len(self.num_requests) != len(FIGURE_13) or not self.seeds or self.max_rounds < 1 or not self.close > 0:
            raise ConfigError("study needs num_requests of sharegpt and alpaca, a seed, a round, and close above 0")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        aims = implied_step_times()
        host = np.array([0.0, 0.0])
        for number in range(self.max_rounds):
            path = self._write(cells.out_dir / "profiles" / f"round-{number}.yaml", host)
            times, batches = self._round(cells, path, number)
            short = np.array([aims[name] - times[name].value for name in aims])
            if (np.abs(short) <= self.close * np.array([*aims.values()])).all():
                break
            # A longer step gathers more requests, which makes it longer still: so half of what lacks.
            host = np.maximum(host + DAMPING * solve_host(short, BATCHES), 0.0)
        else:
            raise EngineError(f"the two step times were not met within {self.close:g} in {self.max_rounds} rounds")
        target = self._write(cells.out_dir / "fitted.yaml", host)
        return self._findings(aims, times, batches, host, target)

    def _write(self, path: Path, host: np.ndarray) -> Path:
        """The card with these host times, as a profile's file."""
        card = load_profile(self.card)
        assert isinstance(card, Card)
        # Which part passes before a step and which after it is not known; it makes no difference without overlap.
        card = replace(card, host=HostTime(before=float(host[0]), before_per_request=float(host[1])))
        write_text(path, OmegaConf.to_yaml({"kind": "card"} | asdict(card)))
        return path

    def _round(self, cells: CellRunner, profile: Path, number: int) -> tuple[dict[str, Mean], dict[str, Mean]]:
        """Step times in seconds and batches of each workload, over seeds."""
        times: dict[str, Mean] = {}
        batches: dict[str, Mean] = {}
        for workload, rate in FIGURE_13:
            load = Load(workload, rate, self.num_requests[workload])
            found = []
            for seed in self.seeds:
                run_system(cells, "vLLM", load, f"runner.profile={profile}", seed=seed, label=f"round{number}")
                found.append(step_time_and_batch(cells.folders[-1]))
            times[workload], batches[workload] = (Mean.of(values) for values in zip(*found, strict=True))
        return times, batches

    def _findings(
        self, aims: dict[str, float], times: dict[str, Mean], batches: dict[str, Mean], host: np.ndarray, path: Path
    ) -> Findings:
        claims: list[Claim] = [
            fitted(f"{name}: seconds a step", "ms", MS * aims[name], times[name].scaled(MS)) for name in aims
        ]
        claims += [
            measured("host time of a step", "ms", MS * float(host[0])),
            measured("host time of a step, for each request in it", "ms", MS * float(host[1])),
            *(measured(f"{name}: mean batch under the fit", "", batches[name], note="beside the paper's in paper_fig13")
              for name in aims),
        ]  # fmt: skip
        names = list(aims)
        chart = Chart(
            "step_times", "bars", "", "time of a step (ms)", "Step times that Figure 13 implies, and the fit's.",
            [Series("paper, by Little's law", names, [MS * aims[name] for name in names]),
             Series("fitted profile", names, [MS * times[name].value for name in names])],
        )  # fmt: skip
        return Findings(
            title="PagedAttention's engine as a profile",
            headline=f"Host times of {MS * host[0]:.2f} ms a step and {MS * host[1]:.3f} ms a request on top of the "
            f"card {self.card} give the two step times that Figure 13 implies. Two numbers, two parameters: this fit "
            "proves nothing by itself.",
            source=FIGURE_13_SOURCE,
            claims=claims,
            charts=[chart],
            differences=[
                "Why a cost for each request: Alpaca's step reads fewer KV tokens than ShareGPT's and takes 30 ms "
                "longer with four times the requests, so no cost of a KV token can give both. vLLM of 2023 drew one "
                "request's token at a time (github.com/vllm-project/vllm/issues/249, its author's answer), prepared "
                "its inputs in Python lists and ran without CUDA graphs.",
            ],
            notes=[
                "Little's law: requests in a step = requests per second x output tokens x seconds a step. A cell's "
                "step time is requests in a step x step time over tokens sampled, between a quarter and the whole of "
                "the arrivals' time, so that it holds when a queue grows too.",
                "Each round adds half of what both step times lack, at the paper's batches; it ended when both were "
                f"met within {self.close:.1%}. "
                f"The profile is in {path.name}; conf/profile/a100-40gb-vllm-2023.yaml is this file with comments.",
            ],
        )


def implied_step_times() -> dict[str, float]:
    """Workload -> seconds a step in the paper's vLLM, by Little's law on its own bars."""
    return {workload: bars["vLLM"] / (rate * MEAN_OUTPUTS[workload]) for (workload, rate), bars in FIGURE_13.items()}


def solve_host(short: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """(seconds a step, seconds a request in it) that add `short` seconds to steps of the two `batches`."""
    added: np.ndarray = np.linalg.solve(np.stack([np.ones(len(batches)), batches], axis=1), short)
    return added


def step_time_and_batch(folder: Path) -> tuple[float, float]:
    """Seconds a token takes, and the mean batch, of a run folder's steady part."""
    run = read_run(folder)
    window = steady(run)
    seconds = step_spans(run.steps).weight[window]
    places = float((run.steps["num_scheduled"][window] * seconds).sum())
    return places / float(run.steps["num_sampled"][window].sum()), places / float(seconds.sum())
