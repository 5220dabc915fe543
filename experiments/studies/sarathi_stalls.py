"""Sarathi-Serve: prompts that stall running decodes, and chunks that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.studies.base import Chart, Claim, Findings, Series, at_least, at_most, up_to
from experiments.studies.cells import CellRunner
from experiments.studies.curves import Curve, highest_below
from experiments.studies.published import SARATHI_CAPACITY, SARATHI_SOURCE
from reports.files import read_json

LABELS = {"prefill_first": "prefill first", "chunked": "chunked"}
MS = 1000.0


@dataclass(frozen=True)
class SarathiStallsStudy:
    """Args:
    rates: requests per second, rising.
    duration: seconds of arrivals at every rate.
    token_budget: most new tokens in a step of chunked prefill; prefill first takes whole prompts.
    max_tbt: p99 of the time between tokens up to which a rate counts as sustained, in seconds.
    max_delay: median wait before the first step up to which it does, in seconds.
    """

    rates: Sequence[float]
    duration: float
    token_budget: int
    max_tbt: float
    max_delay: float

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in LABELS}
        bound = 0.0
        for rate in self.rates:
            for name in LABELS:
                found[name].append(self._cell(cells, name, rate))
            bound = longest_step(read_json(cells.folders[-1] / "manifest.json"), self.token_budget)
        tails = {name: [MS * cell["itl_seconds"]["p99"] for cell in of] for name, of in found.items()}
        gaps = {name: [MS * cell["itl_seconds"]["max"] for cell in of] for name, of in found.items()}
        first, last = tails["prefill_first"][-1], tails["chunked"][-1]
        return Findings(
            title="Sarathi-Serve: stall-free decoding",
            headline=f"At {self.rates[-1]:g} requests/s the p99 time between tokens is {first:.0f} ms with prompts "
            f"first and {last:.0f} ms with chunks; the longest gap at any load is {max(gaps['prefill_first']):.0f} ms "
            f"and {max(gaps['chunked']):.0f} ms, where a full step takes at most {MS * bound:.0f} ms.",
            source=SARATHI_SOURCE,
            claims=[*self._claims(tails, gaps, MS * bound), self._capacity(found)],
            charts=[
                self._chart("tbt_p99", tails, "p99 time between tokens (ms)", MS * self.max_tbt),
                self._chart("longest_gap", gaps, "longest time between tokens (ms)", MS * bound),
                self._first_token_chart(found),
            ],
            differences=[
                "The paper measures Mistral-7B on one A100 and compares with vLLM of its time; here a Llama-3.1-8B "
                "shape runs on a simulated A100 with 80 GB, and both schedulers are ours.",
                "Lengths follow the Azure conversation trace; the paper has openchat_sharegpt4 and arXiv "
                "summarisation, whose prompts are longer.",
                f"The limits of a sustained rate ({self.max_tbt:g} s of p99 time between tokens, {self.max_delay:g} s "
                "of median wait) are ours; the paper's are multiples of a decode step.",
            ],
            notes=[
                f"Poisson arrivals for {self.duration:g} s per rate, the same requests for both. Prefill first computes"
                " whole prompts, as many as fit into a step of the longest request, before any decode goes on.",
                "Time between tokens: every gap between two tokens of a request, over all requests. The p99 and the "
                "longest are of the same gaps.",
                f"A full step: {self.token_budget} tokens, every place of the batch taken, all KV of the pool read, by "
                "the same step times. It bounds the gap of a request that is not preempted.",
            ],
        )

    def _cell(self, cells: CellRunner, name: str, rate: float) -> dict[str, Any]:
        scheduler = ["scheduler=chunked", f"scheduler.max_num_batched_tokens={self.token_budget}"]
        if name == "prefill_first":
            scheduler = ["scheduler=continuous", "scheduler.max_num_batched_tokens=${engine.max_model_len}"]
        load = [f"workload.num_requests={max(1, round(rate * self.duration))}", f"arrival.rate={rate}"]
        return cells.run(f"{name}-{rate:g}", [*scheduler, *load])

    def _claims(self, tails: dict[str, list[float]], gaps: dict[str, list[float]], bound: float) -> list[Claim]:
        claims = [
            at_least(
                f"p99 time between tokens at {rate:g} requests/s, prefill first over chunked", "times",
                1.0, ours / theirs, note=f"{ours:.0f} ms against {theirs:.0f} ms",
            )
            for rate, ours, theirs in zip(self.rates, tails["prefill_first"], tails["chunked"], strict=True)
        ]  # fmt: skip
        note = "a full step, by the same step times"
        quantity = "longest time between tokens at any load"
        return [
            *claims,
            at_most(f"{quantity}, chunked", "ms", bound, max(gaps["chunked"]), note=note),
            at_least(f"{quantity}, prefill first", "ms", bound, max(gaps["prefill_first"]), note="nothing bounds it"),
        ]

    def _capacity(self, found: dict[str, list[dict[str, Any]]]) -> Claim:
        """How much more load chunks sustain under both limits."""
        rates = {name: highest_below(Curve(self.rates, [*map(self._strain, of)]), 1.0) for name, of in found.items()}
        ours, theirs = rates["chunked"], rates["prefill_first"]
        told = {name: "not bracketed by the rates" if rate is None else f"{rate:.2f}" for name, rate in rates.items()}
        note = f"paper: up to {SARATHI_CAPACITY:g}; {told['chunked']} against {told['prefill_first']} requests/s"
        ratio = ours / theirs if ours and theirs else None
        return up_to("load that chunks sustain, against prefill first", "", SARATHI_CAPACITY, ratio, note=note)

    def _strain(self, cell: dict[str, Any]) -> float:
        """Above 1 where a limit is broken."""
        return max(cell["itl_seconds"]["p99"] / self.max_tbt, cell["queue_time_seconds"]["p50"] / self.max_delay)

    def _chart(self, name: str, values: dict[str, list[float]], label: str, mark: float) -> Chart:
        what = "the limit of a sustained rate" if name == "tbt_p99" else "what a full step of chunks takes"
        series = [Series(LABELS[policy], self.rates, of) for policy, of in values.items()]
        caption = f"{label.removesuffix(' (ms)').capitalize()} against load. The dotted line is {what}."
        return Chart(name, "lines", "request rate (requests/s)", label, caption, series, log_y=True, y_mark=mark)

    def _first_token_chart(self, found: dict[str, list[dict[str, Any]]]) -> Chart:
        series = [
            Series(LABELS[name], self.rates, [MS * cell["ttft_seconds"]["p50"] for cell in of])
            for name, of in found.items()
        ]
        caption = "The price: a prompt in chunks takes longer to its first token."
        x, y = "request rate (requests/s)", "median time to first token (ms)"
        return Chart("ttft", "lines", x, y, caption, series, log_y=True)


def longest_step(manifest: dict[str, Any], token_budget: int) -> float:
    """Seconds that no step of at most `token_budget` new tokens can exceed, by a card's profile.

    Args:
        manifest: of a simulated run.
        token_budget: most new tokens in a step.
    """
    time = manifest["simulation"]["step_time"]
    host = manifest["simulation"]["figures"]["host"]
    num_seqs = manifest["strategy"]["details"]["max_num_seqs"]
    device = (
        time["base"]
        + max(time["weights"], time["per_token"] * token_budget)
        + time["per_request"] * num_seqs
        + time["per_kv_token"] * manifest["pool"]["num_slots"]
        + time["per_attention_pair"] * token_budget * manifest["model"]["max_model_len"]
    )
    around = host["before"] + host["after"] + (host["before_per_request"] + host["after_per_request"]) * num_seqs
    return float(device + around)
