"""Virtual Token Counter: its bound on unfairness between two clients that wait, beside first come first served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.studies.base import Chart, Findings, Series, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, at_most, check, compared, measured
from kvarena.experiments.studies.orca import seeds_text
from kvarena.experiments.studies.papers.published import VTC_SOURCE
from kvarena.reports.reading.files import RunFiles, flat, read_run

POLICIES = {"fair": "VTC (fair)", "chunked": "first come first served"}
CLIENTS = ("chat", "code")
NUM_POINTS = 300


class Gap(NamedTuple):
    """The difference of two clients' service over time, while both wait.

    Attributes:
        seconds: of each moment.
        values: the difference then, in weighted tokens.
        bound: the theorem's, of this run.
    """

    seconds: np.ndarray
    values: np.ndarray
    bound: float


@dataclass(frozen=True)
class VtcFairnessStudy:
    """Args:
    num_requests: of both clients together, all there at the start.
    flood_rate: requests per second of both in the second pair of cells.
    flood_requests: how many arrive in it.
    flood_share: requests of the client that floods, for each one of the other.
    input_weight: cost of a prompt token.
    output_weight: cost of an output token.
    seeds: of the workload.

    Raises:
        ConfigError: no seed.
    """

    num_requests: int
    flood_rate: float
    flood_requests: int
    flood_share: float
    input_weight: float
    output_weight: float
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("study.seeds must name at least one seed")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        gaps: dict[str, list[Gap]] = {policy: [] for policy in POLICIES}
        waits: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
        for policy in POLICIES:
            for seed in self.seeds:
                load = ["arrival=all_at_once", f"workload.num_requests={self.num_requests}", f"workload.seed={seed}"]
                cells.run(f"backlogged-{policy}-seed{seed}", [*self._scheduler(policy), *load])
                gaps[policy].append(self._gap(read_run(cells.folders[-1])))
                waits[policy].append(self._flood(cells, policy, seed))
        largest = {policy: max(spread(gap.values) for gap in of) for policy, of in gaps.items()}
        bound = min(gap.bound for of in gaps.values() for gap in of)
        return Findings(
            title="Virtual Token Counter: fairness between clients",
            headline=f"While both clients wait, their service differs by at most {largest['fair']:,.0f} under VTC and "
            f"{largest['chunked']:,.0f} first come first served (largest of {len(self.seeds)} seeds); the theorem's "
            f"bound is {bound:,.0f}.",
            source=VTC_SOURCE,
            claims=self._claims(gaps, waits),
            charts=[self._gap_chart({policy: of[0] for policy, of in gaps.items()}), _wait_chart(waits)],
            differences=[
                "The bound is the paper's, exactly; the clients are ours: chat with ShareGPT-like lengths, and code "
                "with the Azure code trace's, long prompts and short answers.",
                "The paper bounds an engine that admits between decode steps; here prompts are computed in chunks. "
                "A prompt is charged when its request is admitted, as in the paper.",
            ],
            notes=[
                f"Service: {self.input_weight:g} per prompt token at admission and {self.output_weight:g} per output "
                "token when it is there. Difference: code minus chat since the start, looked at after every admission "
                "and token, while both have requests that wait; all requests are there at the start.",
                "The theorem bounds the difference over any stretch in which both wait by 2 max(w_p L_input, w_q M), "
                "with L_input the longest prompt and M the most tokens in a batch, here the pool's slots. What is "
                "shown is the difference between the largest and the smallest value, which covers every stretch. A "
                "theorem is no measured number: that it holds is a check, of every seed; the figure is the first "
                "seed's.",
                f"Flood: Poisson, {self.flood_rate:g} requests/s, {self.flood_share:g} of code for one of chat. "
                f"{seeds_text(self.seeds)}",
            ],
        )  # fmt: skip

    def _scheduler(self, policy: str) -> list[str]:
        if policy != "fair":
            return [f"scheduler={policy}"]
        return [
            "scheduler=fair",
            f"scheduler.input_weight={self.input_weight}",
            f"scheduler.output_weight={self.output_weight}",
        ]

    def _gap(self, run: RunFiles) -> Gap:
        """Service of code minus that of chat after each admission and token, while both wait."""
        requests = run.requests
        of_code = np.array([name.partition("/")[0] == CLIENTS[1] for name in requests["client_id"]])
        if of_code.all() or not of_code.any():
            raise EngineError(f"{run.path.name}: requests of one client only; raise study.num_requests")
        sign = np.where(of_code, 1.0, -1.0)
        tokens = run.lists("token_times")
        times = np.concatenate([requests["admission_time"], flat(tokens)])
        costs = np.concatenate([
            self.input_weight * requests["num_prompt_tokens"] * sign,
            self.output_weight * np.repeat(sign, tokens.value_lengths().to_numpy()),
        ])  # fmt: skip
        both_wait = min(requests["admission_time"][mask].max() for mask in (of_code, ~of_code))
        moments, group = np.unique(times, return_inverse=True)
        gap = np.cumsum(np.bincount(group, weights=costs))
        inside = moments < both_wait
        return Gap(moments[inside], gap[inside], self._bound(run))

    def _bound(self, run: RunFiles) -> float:
        longest = float(run.requests["num_prompt_tokens"].max())
        return 2 * max(self.input_weight * longest, self.output_weight * float(run.manifest["pool"]["num_slots"]))

    def _flood(self, cells: CellRunner, policy: str, seed: int) -> dict[str, float]:
        """Client -> median time to first token in seconds, while code floods."""
        load = [
            "arrival=poisson",
            f"arrival.rate={self.flood_rate}",
            f"workload.num_requests={self.flood_requests}",
            f"workload.weights.code={self.flood_share}",
            f"workload.seed={seed}",
        ]
        cells.run(f"flood-{policy}-seed{seed}", [*self._scheduler(policy), *load])
        requests = read_run(cells.folders[-1]).requests
        names = np.array([name.partition("/")[0] for name in requests["client_id"]])
        ttft = requests["first_token_time"] - requests["arrival_time"]
        return {client: float(np.nanmedian(ttft[names == client])) for client in CLIENTS}

    def _claims(self, gaps: dict[str, list[Gap]], waits: dict[str, list[dict[str, float]]]) -> list[Claim]:
        parts = {policy: [spread(gap.values) / gap.bound for gap in of] for policy, of in gaps.items()}
        spreads = {policy: Mean.of([spread(gap.values) for gap in of]) for policy, of in gaps.items()}
        times = {policy: [wait["chat"] for wait in of] for policy, of in waits.items()}
        ratio = Mean.of_ratios(times["chunked"], times["fair"])
        note = f"{np.mean(times['chunked']):.2f} s against {np.mean(times['fair']):.2f} s"
        quantity = "largest difference of service while both clients wait"
        return [
            *(measured(f"{quantity}, {POLICIES[policy]}", "", mean) for policy, mean in spreads.items()),
            compared("median time to first token of chat while code floods, first come first served over VTC", ratio,
                     note=note),
            check(at_most(f"{quantity} over the theorem's bound, VTC, largest of all seeds", "times", 1.0,
                          max(parts["fair"]), note="the paper's theorem 4.4")),
            check(at_least(f"{quantity} over the theorem's bound, first come first served, least of all seeds", "times",
                           1.0, min(parts["chunked"]), note="nothing bounds it: the other side of the check")),
        ]  # fmt: skip

    def _gap_chart(self, gaps: dict[str, Gap]) -> Chart:
        series: list[Series] = []
        for policy, gap in gaps.items():
            chosen = np.linspace(0, len(gap.seconds) - 1, min(NUM_POINTS, len(gap.seconds))).astype(int)
            series.append(Series(POLICIES[policy], gap.seconds[chosen].tolist(), np.abs(gap.values[chosen]).tolist()))
        caption = (
            "Difference of the service that two clients received, while both wait. The dotted line is VTC's bound."
        )
        x, y = "time (s)", "difference of service (weighted tokens)"
        return Chart(
            "service_gap", "lines", x, y, caption, series, y_mark=gaps["fair"].bound, y_mark_name="VTC's bound"
        )


def _wait_chart(waits: dict[str, list[dict[str, float]]]) -> Chart:
    series = [
        mean_series(label, list(CLIENTS), [Mean.of([wait[client] for wait in waits[policy]]) for client in CLIENTS])
        for policy, label in POLICIES.items()
    ]
    caption = "Median time to first token while code floods the engine and chat asks for little."
    return Chart("flood", "bars", "client", "median time to first token (s)", caption, series)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Largest difference between any two of the values, 0 among them: over every stretch since the start."""
    return float(max(0.0, np.max(values)) - min(0.0, np.min(values)))
