"""Verdicts from repeats: which cells of a comparison differ, and how sure that is. Pure: arrays in, verdicts out.

The rule in two sentences. The ratio of a cell to another one is taken in each block (a round of one seed, in which
both ran, one soon after the other) and Student's t says over the blocks whether its logarithm differs from 0; the
rounds of one seed share its requests, so with several seeds they are averaged and each seed counts once. All verdicts
of a report are corrected together (Holm, 1979) to a level of 3 %, half of it for throughput and half for latencies.

Drift is within the rule without a model of it: what is slower than a block cancels in its ratio, and what is faster
changes sign with the order of the cells (experiments/settings/run_order.py), so that it widens the interval instead of
moving it. `kvarena check verdict_rates` measures how often it errs and decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from kvarena.reports.analysis.intervals import StudentMean

LEVEL = 0.03  # of a report that holds any false verdict: an exact 5 % would break "16 of 200" in one setting of fifty
POWER = 0.9  # the share of reports that decide, where the difference is the smallest that they are to show
THROUGHPUT = "output_tokens_per_second"
FASTEST = "fastest"
SMALLEST_SD = 1e-9  # of a log ratio: below it is the rounding of floats

LOWER, HIGHER, SAME = "lower", "higher", "no difference shown"
ONE_RUN = "one run each: no interval"
ONE_SEED = "one seed: no interval"  # a simulated run has no noise but its seed's
MACHINE_CHANGED = "not decided: the machine changed"
ONE_ORDER = "not decided: always run in the same order"
NO_PAIR = "no pair"
DECIDED = (LOWER, HIGHER)


@dataclass(frozen=True)
class Ratios:
    """One metric of a cell over that of another cell, block by block.

    Attributes:
        values: the cell's value / the other's, one per block; NaN where either has none.
        seeds: the seed of each block; None: all of one seed.
        machine: the machine's speed (contention probe) beside the cell / beside the other; NaN where not measured.
        positions: seconds by which the cell began after the other; NaN where unknown.
        is_simulated: under a virtual clock, where rounds of one seed are the same run.
    """

    values: np.ndarray
    seeds: Sequence[Hashable] | None = None
    machine: np.ndarray | None = None
    positions: np.ndarray | None = None
    is_simulated: bool = False


@dataclass(frozen=True)
class Question:
    """What a verdict is asked about: one metric of a cell against another cell, or against several at once.

    Attributes:
        key: what the caller calls it.
        metric: decides to which half of the level it belongs.
        ratios: against each other cell. With several the question is whether the cell exceeds all of them, and the
            answer is that about the one against which it is least sure.
    """

    key: Hashable
    metric: str
    ratios: Sequence[Ratios]


@dataclass
class Verdict:
    """The answer to a question.

    Attributes:
        key, metric: of the question.
        verdict: `lower`, `higher`, `no difference shown`, or why nothing is decided.
        repeats: what counts: blocks of one seed, or seeds.
        unit: "rounds" or "seeds".
        ratio: geometric mean over repeats; None without a pair.
        interval: of the ratio alone, at 95 %; None with fewer than two repeats.
        p: two-sided, of this question alone; None with fewer than two repeats.
        p_holm: corrected for all questions of the report; at most LEVEL where it is decided.
        machine_ratio: the machine's speed beside the cell / beside the other, geometric mean; None if not measured.
        rival: index of the other cell that the answer is about.
    """

    key: Hashable
    metric: str
    verdict: str
    repeats: int = 0
    unit: str = "rounds"
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    machine_ratio: float | None = None
    rival: int = 0
    is_decided: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_decided = self.verdict in DECIDED

    def as_dict(self) -> dict[str, Any]:
        """What summary.json holds."""
        names = ("verdict", "ratio", "interval", "repeats", "unit", "p", "p_holm", "machine_ratio")
        return {name: getattr(self, name) for name in names}


def decide(questions: Sequence[Question]) -> list[Verdict]:
    """Answer all questions of one report: of reports of equal cells, at most LEVEL hold a false verdict.

    Args:
        questions: every one that the report prints a verdict about.
    """
    answers = [_alone(question) for question in questions]
    open_ones = [(answer, answer.p) for answer in answers if answer.p is not None]
    adjusted = holm([p for _, p in open_ones], shares([answer.metric for answer, _ in open_ones]))
    for (answer, _), p_holm in zip(open_ones, adjusted, strict=True):
        answer.p_holm = p_holm
        if answer.verdict == SAME and answer.ratio is not None and p_holm <= LEVEL:
            answer.verdict = HIGHER if answer.ratio > 1 else LOWER
        if answer.verdict in DECIDED and machine_explains(answer):
            answer.verdict = MACHINE_CHANGED
        answer.is_decided = answer.verdict in DECIDED
    return answers


def shares(metrics: Sequence[str]) -> np.ndarray:
    """Each question's share of the level: half is split among those about throughput, half among the others."""
    is_first = np.array([metric in (THROUGHPUT, FASTEST) for metric in metrics], dtype=bool)
    counts = np.where(is_first, is_first.sum(), (~is_first).sum())
    return np.full(len(metrics), 1.0) / counts / (2 if is_first.any() and not is_first.all() else 1)


def holm(p_values: Sequence[float], weights: np.ndarray) -> list[float]:
    """Holm's step-down adjusted p-values, weighted (Holm, 1979, section 4).

    Args:
        p_values: one per hypothesis.
        weights: of each, adding up to 1.
    """
    weighed = np.asarray(p_values) / weights
    order = np.argsort(weighed, kind="stable")
    left = np.cumsum(weights[order][::-1])[::-1]  # weight of the hypotheses that are still open
    result = np.empty(len(weighed))
    result[order] = np.minimum(1.0, np.maximum.accumulate(weighed[order] * left))
    return [float(value) for value in result]


def _alone(question: Question) -> Verdict:
    """The answer without the others: p is not corrected yet."""
    answers = [_pair(question, index) for index in range(len(question.ratios))]
    if len(answers) == 1:
        return answers[0]
    # The cell was chosen because it is best: to compare it with the nearest rival at the two-sided level is enough
    # (Gutmann and Maymin, Annals of Statistics 15, 1987).
    undecided = [answer for answer in answers if answer.p is None or answer.verdict != SAME]
    if undecided:
        return undecided[0]
    nearest = min(answers, key=lambda answer: answer.ratio or 0.0)
    if nearest.ratio is None or nearest.ratio <= 1:
        nearest.p = 1.0
        return nearest
    return max(answers, key=lambda answer: answer.p or 0.0)


def _pair(question: Question, rival: int) -> Verdict:
    ratios = question.ratios[rival]
    answer = Verdict(question.key, question.metric, NO_PAIR, rival=rival)
    logs, seeds, known = _log_ratios(ratios)
    if not len(logs):
        return answer
    units = per_repeat(logs, seeds)
    num_seeds = len(set(seeds))
    answer.unit = "seeds" if num_seeds > 1 or ratios.is_simulated else "rounds"
    answer.repeats = num_seeds if ratios.is_simulated else len(units)
    answer.ratio = float(np.exp(units.mean()))
    answer.machine_ratio = _machine(ratios, known)
    if answer.repeats < 2:
        answer.verdict = ONE_RUN if len(logs) == 1 else ONE_SEED
        return answer
    mean = StudentMean.of(units, SMALLEST_SD)
    low, high = mean.interval
    answer.p, answer.interval = mean.p, (float(np.exp(low)), float(np.exp(high)))
    answer.verdict = ONE_ORDER if _always_one_order(ratios, known) else SAME
    return answer


def _log_ratios(ratios: Ratios) -> tuple[np.ndarray, list[Hashable], np.ndarray]:
    values = np.asarray(ratios.values, dtype=float)
    known = np.isfinite(values) & (values > 0)
    seeds = [None] * len(values) if ratios.seeds is None else list(ratios.seeds)
    return np.log(values[known]), [seeds[index] for index in np.flatnonzero(known)], known


def per_repeat(logs: np.ndarray, seeds: Sequence[Hashable]) -> np.ndarray:
    """What counts as one: the mean of each seed's blocks, or each block where there is one seed."""
    names = list(dict.fromkeys(seeds))
    if len(names) < 2:
        return logs
    return np.array([logs[[seed == name for seed in seeds]].mean() for name in names])


def _machine(ratios: Ratios, known: np.ndarray) -> float | None:
    if ratios.machine is None:
        return None
    speeds = np.asarray(ratios.machine, dtype=float)[known]
    speeds = speeds[np.isfinite(speeds) & (speeds > 0)]
    return float(np.exp(np.log(speeds).mean())) if len(speeds) else None


def machine_explains(answer: Verdict) -> bool:
    """Whether the machine's own speed differed by more than the effect beside the two cells."""
    if answer.machine_ratio is None or answer.ratio is None:
        return False
    return abs(np.log(answer.machine_ratio)) > abs(np.log(answer.ratio))


def _always_one_order(ratios: Ratios, known: np.ndarray) -> bool:
    """Whether one cell ran before the other in every block, so that a drift looks like a difference."""
    if ratios.positions is None or ratios.is_simulated:
        return False
    positions = np.asarray(ratios.positions, dtype=float)[known]
    return bool((positions > 0).all() or (positions < 0).all())


def fastest_of(values: np.ndarray) -> int:
    """The cell with the largest geometric mean over its repeats.

    Args:
        values: [cells, repeats]; NaN where a cell has none.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    logs[~np.isfinite(logs)] = np.nan
    means = [float(np.nanmean(row)) if np.isfinite(row).any() else -np.inf for row in logs]
    return int(np.argmax(means))


def compare_cells(
    metrics: Mapping[str, np.ndarray],
    seeds: Sequence[Hashable] | None = None,
    probes: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> list[Verdict]:
    """All verdicts about cells under the same conditions: each against the first, and whether the best is fastest.

    Args:
        metrics: [cells, blocks] of each metric; NaN where a cell has none. THROUGHPUT is larger for the better.
        seeds: of each block; None: all of one seed.
        probes: [cells, blocks], the machine's speed beside each run; NaN where not measured.
        positions: [cells, blocks], when each run began, in any unit; NaN where unknown.

    Returns:
        One verdict for each metric of each cell but the first, with the key (cell, 0); and for three cells or more one
        of the metric FASTEST with the key (best cell, runner-up).
    """

    def ratios(values: np.ndarray, cell: int, other: int) -> Ratios:
        with np.errstate(divide="ignore", invalid="ignore"):
            return Ratios(
                values[cell] / values[other],
                seeds,
                None if probes is None else probes[cell] / probes[other],
                None if positions is None else positions[cell] - positions[other],
            )

    num_cells = len(next(iter(metrics.values())))
    questions = [
        Question((cell, 0), metric, [ratios(values, cell, 0)])
        for metric, values in metrics.items()
        for cell in range(1, num_cells)
    ]
    others: list[int] = []
    if num_cells > 2 and THROUGHPUT in metrics:
        best = fastest_of(metrics[THROUGHPUT])
        others = [cell for cell in range(num_cells) if cell != best]
        rivals = [ratios(metrics[THROUGHPUT], best, cell) for cell in others]
        questions.append(Question(best, FASTEST, rivals))
    answers = decide(questions)
    if others:
        answers[-1].key = (answers[-1].key, others[answers[-1].rival])
    return answers


def smallest_effect(log_ratio_sd: float, repeats: int, share: float = 1.0) -> float:
    """The smallest difference that so many repeats show in POWER of all reports, as a ratio above 1.

    Args:
        log_ratio_sd: standard deviation of a pair's log ratio from one repeat to the next.
        repeats: at least two.
        share: of the level that the question has (`shares`).
    """
    edge = float(special.stdtrit(repeats - 1, 1 - LEVEL * share / 2))

    def missing(noncentrality: float) -> float:
        return float(stats.nct.sf(edge, repeats - 1, noncentrality)) - POWER

    needed = float(optimize.brentq(missing, 0.0, 20 * edge + 20))
    with np.errstate(over="ignore"):  # infinite where so much noise shows nothing
        return float(np.exp(needed * log_ratio_sd / repeats**0.5))
