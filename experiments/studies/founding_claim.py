"""The claim that kvarena starts from, taken apart: what of a gain is the scheduler's, what is memory's, what it costs.

    {contiguous, paged} x {static, continuous}   in a pool that is cut, so that memory binds    rounds, in turn
    contiguous x static, paged x continuous      in the pool that the card's memory leaves      rounds, in turn
    contiguous, paged x continuous               once, with the scores of every token, not timed: are tokens the same?

Every cell has the same requests, model, kernels and runner. Finished cells are kept, so a call that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.checks import check_int
from kvarena.experiments.settings.run_order import order
from kvarena.experiments.studies.base import Chart, Findings, mean_series, split_chart
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, Verdict, at_most, check, measured
from kvarena.reports.analysis.windows import ALL, DEFINITION, ROOM, Window
from kvarena.reports.comparing.tokens import compare_tokens, tokens_line
from kvarena.reports.comparing.verdicts import HIGHER, LOWER, SAME, THROUGHPUT, Question, Ratios, decide
from kvarena.reports.comparing.verdicts import Verdict as Answer
from kvarena.reports.reading.files import read_json, read_run
from kvarena.reports.reading.names import MANIFEST_FILE

SOURCE = "PagedAttention (Kwon et al., SOSP 2023), section 6.2; Orca (Yu et al., OSDI 2022)"
GRID = {
    "contiguous × static": ("contiguous", "static"),
    "contiguous × continuous": ("contiguous", "continuous"),
    "paged × static": ("paged", "static"),
    "paged × continuous": ("paged", "continuous"),
}
WORST, BEST = "contiguous × static", "paged × continuous"
SAME_SCHEDULER = "contiguous × continuous"
CARD = ", the card's own pool"
METRICS = {THROUGHPUT: "output tokens/s", "tpot_p50": "TPOT, median", "tpot_p99": "TPOT, p99", "e2e_p50": "E2E, median"}
# What is asked: a metric of one cell over another's. The first three are the claim, the next four its price.
SCHEDULER, MEMORY, BOTH = "the scheduler's part", "memory's part", "both"
QUESTIONS = {
    SCHEDULER: (THROUGHPUT, SAME_SCHEDULER, WORST),
    MEMORY: (THROUGHPUT, BEST, SAME_SCHEDULER),
    BOTH: (THROUGHPUT, BEST, WORST),
    "memory's part under static batches": (THROUGHPUT, "paged × static", WORST),
    "the scheduler's part under paged allocation": (THROUGHPUT, BEST, "paged × static"),
    "price: median time per output token": ("tpot_p50", BEST, WORST),
    "price: p99 time per output token": ("tpot_p99", BEST, WORST),
    "median time per output token, memory's part alone": ("tpot_p50", BEST, SAME_SCHEDULER),
    "p99 time per output token, memory's part alone": ("tpot_p99", BEST, SAME_SCHEDULER),
    "median end-to-end time": ("e2e_p50", BEST, WORST),
    "both, with the card's own pool": (THROUGHPUT, BEST + CARD, WORST + CARD),
}
PRICES = ("price: median time per output token", "price: p99 time per output token")
VERDICTS = {HIGHER: Verdict.HIGHER, LOWER: Verdict.LOWER, SAME: Verdict.SAME}
IN_CARD = "both, with the card's own pool"


@dataclass
class _Runs:
    """The rounds of one cell.

    Attributes:
        summaries: of each round's report.
        started: seconds since the epoch.
        speed: of the machine beside the run, in the probe's unit; NaN where it was not measured.
        slots: of the pool.
    """

    summaries: list[dict[str, Any]] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    slots: int = 0

    def add(self, summary: dict[str, Any], folder: Path) -> None:
        """Take a round in."""
        manifest = read_json(folder / MANIFEST_FILE)
        run, probe = manifest["run"], (manifest.get("contention") or {}).get("probe")
        self.summaries.append(summary)
        self.started.append(datetime.fromisoformat(run["ended"]).timestamp() - run["wall_time"])
        self.speed.append(float("nan") if probe is None else (probe["before"] + probe["after"]) / 2)
        self.slots = manifest["pool"]["num_slots"]

    def values(self, metric: str) -> np.ndarray:
        """A metric, one value a round; NaN where a round has none."""
        found = [_metric(summary, metric) for summary in self.summaries]
        return np.array([float("nan") if value is None else value for value in found])

    def share(self, window: Window, name: str = "token_states") -> list[float]:
        """Mean share of the pool in percent, of the rounds that have the window."""
        shares = [summary[f"kv_share_mean{window.suffix}"] for summary in self.summaries]
        return [100 * split[name] for split in shares if split is not None]

    def covered(self, window: Window) -> list[float]:
        """How much of the run's step time the window covers, in percent."""
        return [100 * (summary[f"step_time_share{window.suffix}"] or 0.0) for summary in self.summaries]


@dataclass(frozen=True)
class FoundingClaimStudy:
    """Runs the 2x2 in a cut pool, its corners in the card's own, and a pair that records scores.

    Args:
        rounds: how often each timed cell runs; at least 2 for an interval.
        scores: candidates that are recorded at each token of the pair that is not timed.
        card_slots: the pool of the second part; None: what gpu_memory_utilization leaves of the card (on a GPU only).
    """

    rounds: int = 3
    scores: int = 8
    card_slots: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "scores"):
            check_int(f"study.{name}", getattr(self, name), 1)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        runs: dict[str, _Runs] = {}
        total = self.rounds * (len(GRID) + 2) + 2
        self._run_rounds(cells, runs, list(GRID), "", [], total)
        tokens = self._compare_tokens(cells, total)
        slots = "null" if self.card_slots is None else self.card_slots
        self._run_rounds(cells, runs, [WORST, BEST], CARD, [f"kv_cache.num_slots={slots}"], total)
        answers = self._answers(runs)
        return Findings(
            title="The founding claim, taken apart",
            headline=_headline(runs, answers, self.rounds),
            source=SOURCE,
            claims=[
                *(_claim(name, answer) for name, answer in answers.items()),
                measured("preemptions of a run, paged × continuous", "", Mean.of(_preemptions(runs[BEST]))),
                *_share_claims(runs),
                check(at_most("requests whose first differing token is an error", "", 0, tokens["num_errors"],
                              note=tokens_line([tokens]))),
            ],
            charts=[_split_chart(runs), _rate_chart(runs)],
            differences=[
                f"The pool is cut to {runs[BEST].slots:,} slots, so that memory binds. The card's own holds "
                f"{runs[BEST + CARD].slots:,}; up to {_largest_batch(runs[BEST + CARD])} requests ran at once in it.",
                "Weights are random, so tokens are no text. Lengths are drawn from ShareGPT's published means, and "
                "every request runs to its length.",
            ],
            notes=[
                f"{self.rounds} rounds, the order of the cells another one in each. Ratios are geometric means over "
                "rounds with Student's 95 % interval; verdicts hold for all rows together (Holm, 3 %), by the rule of "
                "sweeps.",
                f"Shares of the pool are means over step time. {DEFINITION}",
                f"Tokens of {SAME_SCHEDULER} and {BEST}, run once more with driver.scores={self.scores} and not timed: "
                f"{tokens_line([tokens])}",
            ],
        )  # fmt: skip

    def _run_rounds(
        self, cells: CellRunner, runs: dict[str, _Runs], names: Sequence[str], suffix: str, options: list[str],
        total: int,
    ) -> None:  # fmt: skip
        """Every cell of `names` once a round, the order another one in each round."""
        for number in range(self.rounds):
            for index in order(len(names), number):
                name = names[index]
                folder = f"{'-'.join(GRID[name])}{'-card' if suffix else ''}-round{number}"
                summary = _run(cells, folder, name, [*options, f"sweep.round={number}"], total)
                runs.setdefault(name + suffix, _Runs()).add(summary, cells.folders[-1])

    def _compare_tokens(self, cells: CellRunner, total: int) -> dict[str, Any]:
        """Whether the allocators gave the same tokens, judged by recorded scores."""
        options = [f"driver.scores={self.scores}", "driver.record=full"]
        found = []
        for name in (SAME_SCHEDULER, BEST):
            _run(cells, f"{'-'.join(GRID[name])}-scores", name, options, total)
            found.append(read_run(cells.folders[-1]))
        reference, run = found
        return {"label": BEST, "reference": SAME_SCHEDULER} | compare_tokens(run, reference)

    def _answers(self, runs: Mapping[str, _Runs]) -> dict[str, Answer]:
        questions = []
        for name, (metric, cell, other) in QUESTIONS.items():
            one, base = runs[cell], runs[other]
            ratios = Ratios(
                one.values(metric) / base.values(metric),
                machine=np.array(one.speed) / np.array(base.speed),
                positions=np.array(one.started) - np.array(base.started),
            )
            questions.append(Question(name, metric, [ratios]))
        return {str(answer.key): answer for answer in decide(questions)}


def _run(cells: CellRunner, folder: str, name: str, options: list[str], total: int) -> dict[str, Any]:
    """Run one cell and say so."""
    allocator, scheduler = GRID[name]
    summary = cells.run(folder, [f"allocator={allocator}", f"scheduler={scheduler}", *options])
    print(
        f"[{len(cells.folders)}/{total}] {folder}: {summary['output_tokens_per_second'] or 0:,.0f} output tokens/s in "
        f"{summary['duration_seconds']:.1f} s, {summary['num_preemptions']} preemptions",
        file=sys.stderr,
        flush=True,
    )
    return summary


def _metric(summary: dict[str, Any], metric: str) -> float | None:
    if metric == THROUGHPUT:
        value: float | None = summary[THROUGHPUT]
        return value
    latency, statistic = metric.split("_")
    found: float | None = summary[f"{latency}_seconds"][statistic]
    return found


def _claim(name: str, answer: Answer) -> Claim:
    """A ratio as a row of the report; nobody stated it."""
    metric, cell, other = QUESTIONS[name]
    verdict = VERDICTS.get(answer.verdict, Verdict.MEASURED if answer.interval is None else Verdict.NOT_DECIDED)
    low, high = answer.interval or (None, None)
    note = f"{METRICS[metric]}, {cell} over {other}"
    if not answer.is_decided:
        note += f"; {answer.verdict}"
    return Claim(name, "times", None, answer.ratio, "", verdict, low, high, note)


def _preemptions(runs: _Runs) -> list[float]:
    return [float(summary["num_preemptions"]) for summary in runs.summaries]


def _largest_batch(runs: _Runs) -> int:
    return max(summary["batch_size_max"] or 0 for summary in runs.summaries)


def _share_claims(runs: Mapping[str, _Runs]) -> list[Claim]:
    """The pool in token states, over all steps and while requests waited for room, with what that covers."""
    claims = []
    for name in GRID:
        for window in (ALL, ROOM):
            if not (shares := runs[name].share(window)):
                continue
            covered = float(np.mean(runs[name].covered(window)))
            note = f"{covered:.1f} % of the run's step time"
            claims.append(
                measured(f"KV pool in token states, {name}, {window.phrase}", "%", Mean.of(shares), note=note)
            )
    return claims


def _times(answer: Answer) -> str:
    """A ratio in a sentence, with the verdict where it is none."""
    if answer.ratio is None:
        return "an unknown number of times"
    text = f"{answer.ratio:.3g} times"
    return text if answer.is_decided else f"{text} ({answer.verdict})"


def _factor(answer: Answer) -> str:
    return _times(answer).replace(" times", "", 1)


def _headline(runs: Mapping[str, _Runs], answers: Mapping[str, Answer], rounds: int) -> str:
    summary = runs[BEST].summaries[0]
    median, tail = (answers[name] for name in PRICES)
    preemptions = float(np.mean(_preemptions(runs[BEST])))
    shares = " and ".join(f"{float(np.mean(runs[name].share(ALL))):.1f} % of it in {name}" for name in (WORST, BEST))
    return (
        f"In a pool cut to {runs[BEST].slots:,} slots (the card's own holds {runs[BEST + CARD].slots:,}), "
        f"{summary['num_requests']} requests that are there at once run {_times(answers[BOTH])} as fast under {BEST} "
        f"as under {WORST}: {_times(answers[SCHEDULER])} by the scheduler with equal memory, {_times(answers[MEMORY])} "
        f"by memory under the same scheduler. The price: the time per output token becomes {_times(median)} as long, "
        f"its p99 {_times(tail)}, with {preemptions:.0f} preemptions a run. Over all steps token states fill {shares}. "
        f"In the card's own pool the factor is {_factor(answers[IN_CARD])}. {rounds} rounds."
    )


def _split_chart(runs: Mapping[str, _Runs]) -> Chart:
    caption = "Mean split of the cut KV pool over all steps, weighted by step time; means over rounds."
    return split_chart(list(GRID), lambda key: [float(np.mean(runs[name].share(ALL, key))) for name in GRID], caption)


def _rate_chart(runs: Mapping[str, _Runs]) -> Chart:
    names = [*GRID, WORST + CARD, BEST + CARD]
    means = [Mean.of(list(runs[name].values(THROUGHPUT))) for name in names]
    series = [mean_series("output tokens/s", names, means)]
    caption = "Output throughput of the same requests, with 95 % intervals over rounds."
    return Chart("throughput", "bars", "", "output tokens per second", caption, series)
