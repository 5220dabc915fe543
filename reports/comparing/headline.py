"""The first sentence of a comparison: which strategy is fastest, if that is shown, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

from kvarena.reports.analysis.windows import kv_use_text
from kvarena.reports.comparing import verdicts
from kvarena.reports.comparing.judge import Judgement
from kvarena.reports.comparing.repeats import Contender
from kvarena.reports.drawing.format import interval, rate, ratio

SMALLEST_P = 1e-4  # below, a p-value says more about the normal distribution than about the machine


def headline(contenders: Sequence[Contender], judgement: Judgement) -> str:
    """One or two sentences that say no more than the verdicts do."""
    best, verdict, second = judgement.best, judgement.fastest, judgement.runner_up
    if best is None:
        return f"None of {len(contenders)} cells finished a request."
    if verdict is None or second is None:
        return f"{_speed(best)}; there is no cell to compare it with."
    where = _conditions(best, contenders)
    if verdict.verdict == verdicts.HIGHER:
        speed = f"{rate(best.summary[verdicts.THROUGHPUT])} output tokens/s"
        text = f"{best.label} is the fastest of {len(judgement.scope)} cells{where} with {speed}, "
        text += f"{ratio(verdict.ratio)} times {second.label} ({sureness(verdict, judgement)})"
        return f"{text}{_over_baseline(best, second, judgement)}{_memory(best)}."
    pair = f"{_speed(best)} and {_speed(second)}"
    if verdict.verdict == verdicts.SAME:
        of = f", of {len(judgement.scope)} cells{where}" if len(judgement.scope) > 2 else where
        how = f"ratio {ratio(verdict.ratio)}, {sureness(verdict, judgement)}"
        return f"No difference shown between {pair}{of} ({how})."
    if verdict.verdict == verdicts.MACHINE_CHANGED:
        return (
            f"Not decided: the machine changed. Its probe ran {ratio(verdict.machine_ratio)} times as fast beside "
            f"{best.label} as beside {second.label}, and output tokens/s were {ratio(verdict.ratio)} times as many."
        )
    if verdict.verdict == verdicts.ONE_ORDER:
        return (
            f"Not decided: {best.label} and {second.label} always ran in the same order, so that a drift of the "
            f"machine looks like their difference ({pair}); sweep.rounds changes the order."
        )
    return _undecided(verdict, judgement, where)


def _undecided(verdict: verdicts.Verdict, judgement: Judgement, where: str) -> str:
    """Figures without a winner."""
    ranked = sorted(judgement.scope, key=lambda one: -one.summary[verdicts.THROUGHPUT])
    if len(ranked) > 3:
        figures = f"{len(ranked)} cells{where} from {_speed(ranked[-1])} to {_speed(ranked[0])}"
    else:
        figures = ", ".join(map(_speed, ranked)) + (f" ({where.strip()})" if where else "")
    reasons = {verdicts.ONE_RUN: "One run each: no interval", verdicts.ONE_SEED: "One seed: no interval"}
    reason = reasons.get(verdict.verdict) or f"Not compared: {_why_no_pair(judgement.scope)}"
    changed = ""
    if verdicts.machine_explains(verdict):
        changed = (
            f" The machine changed by more than the effect: its probe ran {ratio(verdict.machine_ratio)} times as fast "
            f"beside {ranked[0].label}."
        )
    return f"{reason}. {figures}.{changed}"


def _why_no_pair(scope: Sequence[Contender]) -> str:
    reasons = list(dict.fromkeys(f"{one.label}: {one.unpaired}" for one in scope if one.unpaired))
    return "; ".join(reasons[:2]) or "no two runs had the same requests"


def _speed(one: Contender) -> str:
    return f"{one.label}: {rate(one.summary[verdicts.THROUGHPUT])} output tokens/s"


def sureness(verdict: verdicts.Verdict, judgement: Judgement) -> str:
    """95 % interval [1.30, 1.38] over 5 rounds; p = 0.0004, very sure."""
    parts = []
    if verdict.interval is not None:
        parts.append(f"95 % interval {interval(verdict.interval)} over {verdict.repeats} {verdict.unit}")
    if verdict.p_holm is not None:
        many = judgement.num_verdicts
        corrected = f" after Holm over {many} verdicts" if many > 1 else ""
        parts.append(f"{sure(verdict.p_holm)}: {p_text(verdict.p_holm)}{corrected}")
    return "; ".join(parts)


def sure(p_holm: float) -> str:
    """How sure, in words."""
    if p_holm > verdicts.LEVEL:
        return "not sure"
    return "very sure" if p_holm <= verdicts.LEVEL / 30 else "sure" if p_holm <= verdicts.LEVEL / 3 else "fairly sure"


def p_text(p: float | None) -> str:
    """p = 0.004; p < 0.0001."""
    if p is None:
        return ""
    if p < SMALLEST_P:
        return f"p < {SMALLEST_P:.4f}"
    return f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _conditions(best: Contender, contenders: Sequence[Contender]) -> str:
    """Under what conditions, where others were tried too."""
    differing = [
        f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in best.conditions.items()
        if len({repr(one.conditions.get(key)) for one in contenders}) > 1
    ]
    one_strategy = len({one.strategy for one in contenders}) == 1
    return f" at {', '.join(differing)}" if differing and not one_strategy else ""


def _over_baseline(best: Contender, second: Contender, judgement: Judgement) -> str:
    base = best.baseline
    if base is None or base is best or base is second:
        return ""
    verdict = judgement.of(best, base, verdicts.THROUGHPUT)
    return f", and {ratio(verdict.ratio)} times {base.label}" if verdict.verdict == verdicts.HIGHER else ""


def _memory(best: Contender) -> str:
    used = kv_use_text(best.summary)
    return f"; {used}" if used else ""
