"""Sarathi-Serve: prompts that stall running decodes, and chunks that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.studies.base import Chart, Findings, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, at_most, check, compared, near
from kvarena.experiments.studies.curves import Curve, highest_below
from kvarena.experiments.studies.orca import seeds_text
from kvarena.experiments.studies.papers.published import SARATHI_CAPACITY, SARATHI_SOURCE
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import MANIFEST_FILE

LABELS = {"prefill_first": "prefill first", "chunked": "chunked", "timed": "chunked, by step times"}
IDLE_BUDGET = 16384  # tokens of a step in which nobody decodes, where chunks are sized by step times
MS = 1000.0
NEAR = 0.25  # of the paper's value: our limit
Cell = Mapping[str, Any]
Found = dict[str, list[list[Cell]]]  # policy -> one list of cells a rate, in each one a seed


@dataclass(frozen=True)
class SarathiStallsStudy:
    """Args:
    rates: requests per second, rising.
    duration: seconds of arrivals at every rate.
    token_budget: most new tokens in a step of chunked prefill; prefill first takes whole prompts.
    max_tbt: p99 of the time between tokens up to which a rate counts as sustained, in seconds.
    max_delay: median wait before the first step up to which it does, in seconds.
    seeds: of the workload.

    Raises:
        ConfigError: rates that do not rise, or no seed.
    """

    rates: Sequence[float]
    duration: float
    token_budget: int
    max_tbt: float
    max_delay: float
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        rates = list(self.rates)
        if not rates or rates != sorted(set(rates)) or rates[0] <= 0 or not self.seeds:
            raise ConfigError(f"study.rates={rates} must rise from above 0, and study.seeds name at least one seed")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found: Found = {
            name: [[self._cell(cells, name, rate, seed) for seed in self.seeds] for rate in self.rates]
            for name in LABELS
        }
        # Of any cell: the same card, model and pool.
        bound = MS * longest_step(read_json(cells.folders[-1] / MANIFEST_FILE), self.token_budget)
        longest = {name: max(MS * cell["itl_seconds"]["max"] for of in rates for cell in of)
                   for name, rates in found.items()}  # fmt: skip
        capacity = self._capacity(found)
        last = {name: tail(of[-1]).value for name, of in found.items()}
        return Findings(
            title="Sarathi-Serve: stall-free decoding",
            headline=f"Chunks sustain {_times(capacity)} the load that whole prompts first do (paper: "
            f"{SARATHI_CAPACITY:g}). At {self.rates[-1]:g} requests/s the p99 time between tokens is "
            f"{last['chunked']:.0f} ms with chunks and {last['prefill_first']:.0f} ms without; the longest gap at any "
            f"load {longest['chunked']:.0f} and {longest['prefill_first']:,.0f} ms.",
            source=SARATHI_SOURCE,
            claims=[capacity, *self._claims(found, longest, bound), *self._by_step_times(found)],
            charts=[
                self._chart("tbt_p99", found, "p99 time between tokens (ms)", tail, MS * self.max_tbt,
                            "The dotted line is the limit of a sustained rate."),
                self._chart("ttft", found, "median time to first token (ms)", first_token, None,
                            "The price: a prompt in chunks takes longer to its first token, until the queue of the "
                            "other policy grows."),
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
                " whole prompts, as many as fit into a step of the longest request, before any decode goes on. "
                f"{seeds_text(self.seeds)} That a ratio within {NEAR:.0%} of the paper's holds is our limit.",
                "Time between tokens: every gap between two tokens of a request, over all requests of a run. The p99 "
                "and the longest are of the same gaps. Sustained: where the worse of the two, p99 gap and median wait, "
                "reaches its limit, linear between rates, seed by seed.",
                "By step times (scheduler.chunks=timed, ours): a step with a chunk takes 1.5 to 2 times what its "
                f"decodes do, and up to {IDLE_BUDGET:,} tokens while nobody decodes.",
                f"A full step: {self.token_budget} tokens, every place of the batch taken, all KV of the pool read, by "
                "the same step times. It bounds the gap of a request that is not preempted.",
            ],
        )  # fmt: skip

    def _cell(self, cells: CellRunner, name: str, rate: float, seed: int) -> Cell:
        scheduler = ["scheduler=chunked", f"scheduler.max_num_batched_tokens={self.token_budget}"]
        if name == "prefill_first":
            scheduler = ["scheduler=continuous", "scheduler.max_num_batched_tokens=${engine.max_model_len}"]
        elif name == "timed":
            scheduler = ["scheduler=chunked", "scheduler.chunks=timed",
                         f"scheduler.max_num_batched_tokens={IDLE_BUDGET}"]  # fmt: skip
        load = [f"workload.num_requests={max(1, round(rate * self.duration))}", f"arrival.rate={rate}"]
        return cells.run(f"{name}-{rate:g}-seed{seed}", [*scheduler, *load, f"workload.seed={seed}"])

    def _claims(self, found: Found, longest: Mapping[str, float], bound: float) -> list[Claim]:
        ratios = []
        for rate, slow, fast in zip(self.rates, found["prefill_first"], found["chunked"], strict=True):
            ratio = Mean.of_ratios([*map(_p99, slow)], [*map(_p99, fast)])
            quantity = f"p99 time between tokens at {rate:g} requests/s, prefill first over chunked"
            note = f"{tail(slow).value:.0f} ms against {tail(fast).value:.0f} ms"
            ratios.append(compared(quantity, ratio, note=note))
        quantity = "longest time between tokens at any load and seed"
        return [
            *ratios,
            check(at_most(f"{quantity}, chunked", "ms", bound, longest["chunked"],
                          note="a full step, by the same step times")),
            check(at_least(f"{quantity}, prefill first", "ms", bound, longest["prefill_first"],
                           note="nothing bounds it: the other side of the check")),
        ]  # fmt: skip

    def _by_step_times(self, found: Found) -> list[Claim]:
        """Chunks by step times beside chunks by a budget: time between tokens, and to the first."""
        claims = []
        for rate, budget, timed in zip(self.rates, found["chunked"], found["timed"], strict=True):
            for word, value, mean in (("p99 time between tokens", _p99, tail),
                                      ("median time to first token", _ttft, first_token)):  # fmt: skip
                ratio = Mean.of_ratios([*map(value, timed)], [*map(value, budget)])
                note = f"{mean(timed).value:.0f} ms against {mean(budget).value:.0f} ms"
                quantity = f"{word} at {rate:g} requests/s, chunks by step times over chunks by the budget"
                claims.append(compared(quantity, ratio, note=note))
        return claims

    def _capacity(self, found: Found) -> Claim:
        """How much more load chunks sustain under both limits, seed by seed."""
        rates = {name: [self._sustained(found[name], place) for place in range(len(self.seeds))]
                 for name in ("chunked", "prefill_first")}  # fmt: skip
        ours, theirs = Mean.of(rates["chunked"]), Mean.of(rates["prefill_first"])
        ratio = Mean.of_ratios(rates["chunked"], rates["prefill_first"])
        note = f"{ours.value:.2f} against {theirs.value:.2f} requests/s; the paper's is of Mistral-7B"
        return near("load that chunks sustain, over prefill first", "times", SARATHI_CAPACITY, ratio, NEAR, note=note)

    def _sustained(self, of: Sequence[Sequence[Cell]], place: int) -> float:
        """Requests per second of one seed. Raises EngineError where the rates do not bracket it."""
        rate = highest_below(Curve(self.rates, [self._strain(cells[place]) for cells in of]), 1.0)
        if rate is None:
            raise EngineError(
                f"study.rates={list(self.rates)} do not bracket the load that is sustained with seed "
                f"{self.seeds[place]}: the lowest must be, the highest must not"
            )
        return rate

    def _strain(self, cell: Cell) -> float:
        """Above 1 where a limit is broken."""
        return max(cell["itl_seconds"]["p99"] / self.max_tbt, cell["queue_time_seconds"]["p50"] / self.max_delay)

    def _chart(
        self, name: str, found: Found, label: str, value: Callable[[Sequence[Cell]], Mean], mark: float | None,
        caption: str,
    ) -> Chart:  # fmt: skip
        series = [
            mean_series(LABELS[policy], self.rates, [*map(value, of)], on_log=True) for policy, of in found.items()
        ]
        text = f"{label.removesuffix(' (ms)').capitalize()} against load; bands: 95 % over seeds. {caption}"
        return Chart(
            name, "lines", "request rate (requests/s)", label, text, series, log_y=True, y_mark=mark,
            y_mark_name="limit of a sustained rate",
        )  # fmt: skip


def _p99(cell: Cell) -> float:
    return float(cell["itl_seconds"]["p99"])


def _ttft(cell: Cell) -> float:
    return float(cell["ttft_seconds"]["p50"])


def tail(cells: Sequence[Cell]) -> Mean:
    """The p99 time between tokens in milliseconds, over seeds."""
    return Mean.of([MS * _p99(cell) for cell in cells])


def first_token(cells: Sequence[Cell]) -> Mean:
    """The median time to first token in milliseconds, over seeds."""
    return Mean.of([MS * _ttft(cell) for cell in cells])


def _times(claim: Claim) -> str:
    return f"{claim.ours:.2f} times"


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
