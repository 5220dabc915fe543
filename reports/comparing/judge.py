"""What a comparison asks about its contenders, and the answers (verdicts.py) to all of it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.paired import match_requests, request_ratios, same_prompts
from kvarena.reports.comparing.repeats import Contender
from kvarena.reports.comparing.verdicts import (
    FASTEST,
    HIGHER,
    LOWER,
    NO_PAIR,
    THROUGHPUT,
    Question,
    Ratios,
    Verdict,
    decide,
)

LATENCIES = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
METRICS = (THROUGHPUT, *LATENCIES)
REVERSED = {LOWER: HIGHER, HIGHER: LOWER}
Key = tuple[str, str, str]  # labels of the cell and of whom it is compared with, and the metric


@dataclass
class Judgement:
    """All verdicts of a comparison.

    Attributes:
        verdicts: by cell, whom it is compared with, and metric.
        best: the contender with the largest throughput.
        scope: the contenders that it is compared with, itself among them: those under its conditions.
        fastest: whether it exceeds all of them: its verdict against `runner_up`; None where it stands alone.
        runner_up: whom that verdict is about.
    """

    verdicts: dict[Key, Verdict] = field(default_factory=dict)
    best: Contender | None = None
    scope: list[Contender] = field(default_factory=list)
    fastest: Verdict | None = None
    runner_up: Contender | None = None

    @property
    def num_verdicts(self) -> int:
        """Verdicts that are corrected together: those that have repeats."""
        return sum(verdict.p is not None for verdict in self.verdicts.values())

    def of(self, cell: Contender, against: Contender, metric: str) -> Verdict:
        """The verdict about one metric of a pair."""
        return self.verdicts.get((cell.label, against.label, metric)) or Verdict(None, metric, NO_PAIR)

    def as_list(self) -> list[dict[str, Any]]:
        """What summary.json holds."""
        return [
            {"cell": cell, "against": against, "metric": metric} | verdict.as_dict()
            for (cell, against, metric), verdict in self.verdicts.items()
        ]


def judge(contenders: Sequence[Contender], costs: Sequence[tuple[Contender, Contender, str]] = ()) -> Judgement:
    """Answer everything that a report of these contenders says about who differs.

    Args:
        contenders: of a comparison.
        costs: more to ask: a contender, another, and the metric.
    """
    asked: dict[Key, Question] = {}
    for one in contenders:
        if one.baseline is not None and not one.is_baseline:
            for metric in METRICS:
                _ask(asked, one, one.baseline, metric)
    for one, other, metric in costs:
        _ask(asked, one, other, metric)
    result = Judgement()
    result.best, result.scope = _best(contenders)
    rivals = [one for one in result.scope if one is not result.best]
    if result.best is not None and len(rivals) > 1:
        key = (result.best.label, "", FASTEST)
        asked[key] = Question(key, FASTEST, [ratios(result.best, one, THROUGHPUT) for one in rivals])
    elif result.best is not None and rivals and (rivals[0].label, result.best.label, THROUGHPUT) not in asked:
        _ask(asked, result.best, rivals[0], THROUGHPUT)
    for key, verdict in zip(asked, decide(list(asked.values())), strict=True):
        if verdict.metric == FASTEST:
            result.fastest, result.runner_up = verdict, rivals[verdict.rival]
        result.verdicts[key if verdict.metric != FASTEST else (key[0], rivals[verdict.rival].label, FASTEST)] = verdict
    if result.best is not None and len(rivals) == 1:
        result.fastest, result.runner_up = _either_way(result, result.best, rivals[0]), rivals[0]
    return result


def _ask(asked: dict[Key, Question], one: Contender, other: Contender, metric: str) -> None:
    key = (one.label, other.label, metric)
    if key not in asked:
        asked[key] = Question(key, metric, [ratios(one, other, metric)])


def _either_way(result: Judgement, best: Contender, rival: Contender) -> Verdict:
    found = result.verdicts.get((best.label, rival.label, THROUGHPUT))
    if found is not None:
        return found
    answer = result.of(rival, best, THROUGHPUT)
    return replace(
        answer,
        verdict=REVERSED.get(answer.verdict, answer.verdict),
        ratio=None if answer.ratio is None else 1 / answer.ratio,
        interval=None if answer.interval is None else (1 / answer.interval[1], 1 / answer.interval[0]),
        machine_ratio=None if answer.machine_ratio is None else 1 / answer.machine_ratio,
    )


def _best(contenders: Sequence[Contender]) -> tuple[Contender | None, list[Contender]]:
    """The largest throughput, and the contenders under the same conditions that finished anything.

    Where all are of one strategy their conditions are what is compared.
    """
    known = [one for one in contenders if one.summary[THROUGHPUT]]
    if not known:
        return None, []
    best = max(known, key=lambda one: one.summary[THROUGHPUT])
    if len({one.strategy for one in contenders}) == 1:
        return best, known
    return best, [one for one in known if one.conditions == best.conditions]


def ratios(one: Contender, other: Contender, metric: str) -> Ratios:
    """A metric over the other contender's, run by run; latencies as the median of the requests' ratios."""
    pairs = [(run, partner) for run, partner in one.pairs(other) if _comparable(run, partner)]
    probes = [(probe_speed(run), probe_speed(partner)) for run, partner in pairs]
    starts = [(run.start, partner.start) for run, partner in pairs]
    return Ratios(
        values=np.array([_value(run, partner, metric) for run, partner in pairs], dtype=float),
        seeds=[run.seeds for run, _ in pairs],
        machine=np.array([a / b if a and b else np.nan for a, b in probes], dtype=float),
        positions=np.array([a - b if a and b and a != b else np.nan for a, b in starts], dtype=float),
        is_simulated=one.is_simulated and other.is_simulated,
    )


def _comparable(run: Cell, partner: Cell) -> bool:
    if run is partner or run.copy_of is partner or partner.copy_of is run:
        return False  # one run: it differs in nothing
    bases = {id(one.baseline) for one in (run, partner)}
    return (len(bases) == 1 and run.baseline is not None) or same_prompts(run.run, partner.run)


def _value(run: Cell, partner: Cell, metric: str) -> float:
    if metric == THROUGHPUT:
        ours, theirs = (one.summary[THROUGHPUT] for one in (run, partner))
        return ours / theirs if ours and theirs else np.nan
    found = requests_of(run, partner, metric)
    return float(np.median(found)) if len(found) else np.nan


def throughput_ratio(one: Contender, other: Contender) -> float | None:
    """Geometric mean over repeats of the throughput over the other's."""
    values = np.array([_value(run, partner, THROUGHPUT) for run, partner in one.pairs(other)])
    values = values[np.isfinite(values)]
    return float(np.exp(np.log(values).mean())) if len(values) else None


def requests_of(run: Cell, partner: Cell, metric: str) -> np.ndarray:
    """Ratios of a latency, of the requests that have it in both runs."""
    rows, partner_rows = match_requests(run.run, partner.run)
    return request_ratios(run.latencies[metric][rows], partner.latencies[metric][partner_rows])


def probe_speed(run: Cell) -> float | None:
    """The machine's speed beside a run: the geometric mean of its probes; None where it was not measured."""
    probe = (run.run.manifest.get("contention") or {}).get("probe") or {}
    known = [probe[when] for when in ("before", "after") if (probe.get(when) or 0) > 0]
    return float(np.exp(np.mean(np.log(known)))) if known else None


def describe_requests(one: Contender, other: Contender, metric: str) -> dict[str, Any]:
    """What the requests' ratios are like, all repeats together: `count`, `p25`, `p50` and `p75`. No verdict."""
    found = [requests_of(run, partner, metric) for run, partner in one.pairs(other)]
    values = np.concatenate(found) if found else np.empty(0)
    quartiles = np.percentile(values, (25, 50, 75)) if len(values) else (None, None, None)
    names = zip(("p25", "p50", "p75"), quartiles, strict=True)
    return {"count": len(values)} | {name: None if value is None else float(value) for name, value in names}
