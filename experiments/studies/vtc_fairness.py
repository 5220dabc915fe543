"""Virtual Token Counter: its bound on unfairness between two clients that wait, beside first come first served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import EngineError
from experiments.studies.base import Chart, Claim, Findings, Series, at_least, at_most
from experiments.studies.cells import CellRunner
from experiments.studies.published import VTC_SOURCE
from reports.files import RunFiles, read_run

POLICIES = {"fair": "VTC (fair)", "chunked": "first come first served"}
CLIENTS = ("chat", "code")
NUM_POINTS = 300


@dataclass(frozen=True)
class VtcFairnessStudy:
    """Args:
    num_requests: of both clients together, all there at the start.
    flood_rate: requests per second of both in the second pair of cells.
    flood_requests: how many arrive in it.
    flood_share: requests of the client that floods, for each one of the other.
    input_weight: cost of a prompt token.
    output_weight: cost of an output token.
    """

    num_requests: int
    flood_rate: float
    flood_requests: int
    flood_share: float
    input_weight: float
    output_weight: float

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        gaps: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        bound = 0.0
        for policy in POLICIES:
            load = ["arrival=all_at_once", f"workload.num_requests={self.num_requests}"]
            cells.run(f"backlogged-{policy}", [*self._scheduler(policy), *load])
            run = read_run(cells.folders[-1])
            gaps[policy] = self._gap(run)
            bound = self._bound(run)
        waits = {policy: self._flood(cells, policy) for policy in POLICIES}
        largest = {policy: spread(gap) for policy, (_, gap) in gaps.items()}
        return Findings(
            title="Virtual Token Counter: fairness between clients",
            headline=f"While both clients wait, their service differs by at most {largest['fair']:,.0f} under VTC and "
            f"{largest['chunked']:,.0f} first come first served; the theorem's bound is {bound:,.0f}.",
            source=VTC_SOURCE,
            claims=self._claims(largest, bound, waits),
            charts=[self._gap_chart(gaps, bound), _wait_chart(waits)],
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
                "shown is the difference between the largest and the smallest value, which covers every stretch.",
                f"Flood: Poisson, {self.flood_rate:g} requests/s, {self.flood_share:g} of code for one of chat.",
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

    def _gap(self, run: RunFiles) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, service of code minus that of chat) after each admission and token, while both wait."""
        requests = run.requests
        of_code = np.array([name.partition("/")[0] == CLIENTS[1] for name in requests["client_id"]])
        if of_code.all() or not of_code.any():
            raise EngineError(f"{run.path.name}: requests of one client only; raise study.num_requests")
        sign = np.where(of_code, 1.0, -1.0)
        tokens = run.lists("token_times")
        times = np.concatenate([requests["admission_time"], tokens.values])
        costs = np.concatenate([
            self.input_weight * requests["num_prompt_tokens"] * sign,
            self.output_weight * np.repeat(sign, np.diff(tokens.offsets)),
        ])  # fmt: skip
        both_wait = min(requests["admission_time"][mask].max() for mask in (of_code, ~of_code))
        moments, group = np.unique(times, return_inverse=True)
        gap = np.cumsum(np.bincount(group, weights=costs))
        inside = moments < both_wait
        return moments[inside], gap[inside]

    def _bound(self, run: RunFiles) -> float:
        longest = float(run.requests["num_prompt_tokens"].max())
        return 2 * max(self.input_weight * longest, self.output_weight * float(run.manifest["pool"]["num_slots"]))

    def _flood(self, cells: CellRunner, policy: str) -> dict[str, float]:
        """Client -> median time to first token in seconds, while code floods."""
        load = [
            "arrival=poisson",
            f"arrival.rate={self.flood_rate}",
            f"workload.num_requests={self.flood_requests}",
            f"workload.weights.code={self.flood_share}",
        ]
        cells.run(f"flood-{policy}", [*self._scheduler(policy), *load])
        requests = read_run(cells.folders[-1]).requests
        names = np.array([name.partition("/")[0] for name in requests["client_id"]])
        ttft = requests["first_token_time"] - requests["arrival_time"]
        return {client: float(np.nanmedian(ttft[names == client])) for client in CLIENTS}

    def _claims(self, largest: dict[str, float], bound: float, waits: dict[str, dict[str, float]]) -> list[Claim]:
        ratio = waits["chunked"]["chat"] / waits["fair"]["chat"]
        note = f"{waits['chunked']['chat']:.2f} s against {waits['fair']['chat']:.2f} s"
        quantity = "largest difference of service while both clients wait"
        return [
            at_most(f"{quantity}, VTC", "", bound, largest["fair"], note="the paper's theorem 4.4"),
            at_least(f"{quantity}, first come first served", "", bound, largest["chunked"], note="nothing bounds it"),
            at_least("median time to first token of chat while code floods, first come first served over VTC", "times",
                     1.0, ratio, note=note),
        ]  # fmt: skip

    def _gap_chart(self, gaps: dict[str, tuple[np.ndarray, np.ndarray]], bound: float) -> Chart:
        series: list[Series] = []
        for policy, (seconds, gap) in gaps.items():
            chosen = np.linspace(0, len(seconds) - 1, min(NUM_POINTS, len(seconds))).astype(int)
            series.append(Series(POLICIES[policy], seconds[chosen].tolist(), np.abs(gap[chosen]).tolist()))
        caption = (
            "Difference of the service that two clients received, while both wait. The dotted line is VTC's bound."
        )
        return Chart(
            "service_gap", "lines", "time (s)", "difference of service (weighted tokens)", caption, series, y_mark=bound
        )


def _wait_chart(waits: dict[str, dict[str, float]]) -> Chart:
    series = [Series(label, list(CLIENTS), [waits[policy][c] for c in CLIENTS]) for policy, label in POLICIES.items()]
    caption = "Median time to first token while code floods the engine and chat asks for little."
    return Chart("flood", "bars", "client", "median time to first token (s)", caption, series)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Largest difference between any two of the values, 0 among them: over every stretch since the start."""
    return float(max(0.0, np.max(values)) - min(0.0, np.min(values)))
