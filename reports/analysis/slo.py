"""Service-level objectives and goodput (section `slo` of the config).

Whether an objective is met has two rules (`slo.rule`). `per_request`: the share `slo.attainment` of the requests keeps
every limit at once. `percentiles`, MLPerf's: each limit apart is kept by that percentile of the requests, so that up to
1 % may miss the one and another 1 % the other. Of n sorted latencies the percentile q is the one at index floor(q n),
counted from 0, as in MLPerf's LoadGen (loadgen/results.cc); a request that did not finish is slower than any limit.

A request is good when it finished by itself, with at least one token, and its TTFT, TPOT and E2E keep every limit that
is set. What was not measured keeps no limit; only a request with one output token has no TPOT and keeps its limit (as
in vLLM's `bench serve`). Rejected, failed and aborted requests are not good, and stand in the denominator. Goodput =
good requests / duration (vLLM, AIPerf); DistServe's goodput, the largest rate at which a share of the requests is good,
is what `experiment=capacity` finds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.reports.analysis.intervals import wilson
from kvarena.reports.analysis.latency import request_latencies
from kvarena.reports.analysis.steady import SteadyWindow, in_window
from kvarena.reports.drawing.document import Section, Table
from kvarena.reports.drawing.format import DASH, count, interval, percent, rate, seconds
from kvarena.reports.reading.files import RunFiles

PER_REQUEST, PERCENTILES = "per_request", "percentiles"
KEYS = {"ttft": "ttft_seconds", "tpot": "tpot_seconds", "e2e": "e2e_seconds"}


def slo_limits(manifest: dict[str, Any]) -> dict[str, float]:
    """The limits that the run's config sets, in seconds, by `ttft`, `tpot`, `e2e`."""
    section = (manifest.get("config") or {}).get("slo") or {}
    return {key: float(section[key]) for key in KEYS if section.get(key) is not None}


def slo_rule(manifest: dict[str, Any]) -> str:
    """`per_request` or `percentiles`; runs of before there was a choice had the first."""
    return str(((manifest.get("config") or {}).get("slo") or {}).get("rule") or PER_REQUEST)


def kept_limits(run: RunFiles, limits: dict[str, float]) -> dict[str, np.ndarray]:
    """By limit, bool per request: it finished by itself with a token, and was measured to keep that one."""
    latencies = request_latencies(run)
    num_output = run.requests["num_output_tokens"]
    served = run.finished & (num_output > 0)
    kept = {key: served & (latencies[KEYS[key]] <= limit) for key, limit in limits.items()}  # NaN compares false
    if "tpot" in kept:
        kept["tpot"] |= served & (num_output == 1)
    return kept


def is_met(kept: dict[str, np.ndarray], target: float, rule: str) -> bool | None:
    """Whether an objective is met; None where there is no request.

    Args:
        kept: by limit, bool per request (`kept_limits`).
        target: share of the requests, in (0, 1]; under `percentiles` the percentile.
        rule: `per_request` or `percentiles`.
    """
    count = len(next(iter(kept.values())))
    if not count:
        return None
    if rule == PER_REQUEST:
        return bool(np.logical_and.reduce(list(kept.values())).mean() >= target)
    needed = min(count, int(count * target) + 1)  # so that the latency at index floor(q n) is within
    return all(int(one.sum()) >= needed for one in kept.values())


def deciding_share(kept: dict[str, np.ndarray], rule: str) -> float:
    """The share of requests that the rule holds against its target: of all limits at once, or of the worst one."""
    if rule == PER_REQUEST:
        return float(np.logical_and.reduce(list(kept.values())).mean())
    return min(float(one.mean()) for one in kept.values())


def goal_text(manifest: dict[str, Any]) -> str:
    """The objective in words."""
    limits, target = slo_limits(manifest), float(manifest["config"]["slo"]["attainment"])
    if slo_rule(manifest) == PERCENTILES:
        return " and ".join(f"p{100 * target:g} of {limits_text({key: limit})}" for key, limit in limits.items())
    return f"{target:.0%} of the requests with {limits_text(limits)}"


def summarize_slo(run: RunFiles, duration: float, steady: SteadyWindow) -> dict[str, Any] | None:
    """Attainment and goodput of a run; None when its config sets no limit.

    Args:
        run: its files.
        duration: of the whole run, in seconds.
        steady: its steady part, for which the same numbers are given.
    """
    limits = slo_limits(run.manifest)
    if not limits:
        return None
    target = float(run.manifest["config"]["slo"]["attainment"])
    kept, rule = kept_limits(run, limits), slo_rule(run.manifest)
    arrived, _ = in_window(run, steady)
    inside = {key: one[arrived] for key, one in kept.items()}
    return {
        "limits": limits,
        "rule": rule,
        "goal": goal_text(run.manifest),
        "attainment_target": target,
        "whole_run": _attainment(kept, duration, target, rule),
        "steady": _attainment(inside, steady.end - steady.start, target, rule) if steady.found else None,
    }


def _attainment(kept: dict[str, np.ndarray], duration: float, target: float, rule: str) -> dict[str, Any]:
    good = np.logical_and.reduce(list(kept.values()))
    share = float(good.mean()) if len(good) else None
    low, high = wilson(int(good.sum()), len(good)) if len(good) else (None, None)
    return {
        "num_requests": len(good),
        "num_good": int(good.sum()),
        "attainment": share,
        "attainment_ci95_low": low,
        "attainment_ci95_high": high,
        "good_requests_per_second": float(good.sum()) / duration if duration > 0 else None,
        "shares_within": {key: float(one.mean()) if len(one) else None for key, one in kept.items()},
        "met": is_met(kept, target, rule),
    }


def limits_text(limits: dict[str, float]) -> str:
    """TTFT <= 2.00 s, TPOT <= 200 ms."""
    return ", ".join(f"{key.upper()} ≤ {seconds(limit)}" for key, limit in limits.items())


def slo_section(summary: dict[str, Any]) -> Section:
    """Attainment and goodput as a table."""
    slo = summary["slo"]
    rows = []
    for label, part in (("whole run", slo["whole_run"]), ("steady part", slo["steady"])):
        if part is not None:
            ends = part["attainment_ci95_low"], part["attainment_ci95_high"]
            rows.append([label, f"{count(part['num_good'])} of {count(part['num_requests'])}",
                         percent(part["attainment"]), interval(ends, percent), rate(part["good_requests_per_second"]),
                         *(percent(part["shares_within"][key]) for key in slo["limits"]),
                         met_text(part["met"])])  # fmt: skip
    limits = [f"within {limits_text({key: limit})}" for key, limit in slo["limits"].items()]
    header = ["", "good requests", "attainment", "95 % interval", "goodput (requests/s)", *limits, "objective"]
    table = Table(header, rows, text_columns=frozenset({len(header) - 1}))
    note = (
        f"Good: finished by itself, with a token and {limits_text(slo['limits'])}. Denominator: every request that "
        "arrived in the window, rejected and failed ones too. Goodput: good requests / the window's length (whole run: "
        f"the duration). Objective: {slo['goal']}{_rule_text(slo['rule'])}. "
        "Intervals: Wilson's, over requests."
    )
    return Section("Service-level objective", [], [], [table], [note])


def met_text(met: bool | None) -> str:
    """Whether an objective is met, in a table."""
    return DASH if met is None else "met" if met else "missed"


def _rule_text(rule: str) -> str:
    return ", each limit apart, as MLPerf judges" if rule == PERCENTILES else ", all limits at once"
