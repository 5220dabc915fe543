"""Goodput: requests that kept every limit of a service-level objective (section `slo` of the config).

A request is good when it finished by itself and its TTFT, TPOT and E2E keep every limit that is set; a request with one
output token has no TPOT and keeps its limit (as in vLLM's `bench serve`). Rejected, failed and aborted requests are not
good, and stand in the denominator. Goodput = good requests / duration (vLLM, AIPerf); DistServe's goodput, the
largest rate at which a share of the requests is good, is what `experiment=capacity` finds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reports.document import Section, Table
from reports.files import RunFiles
from reports.format import DASH, count, percent, rate, seconds
from reports.latency import request_latencies
from reports.steady import SteadyWindow, in_window

KEYS = {"ttft": "ttft_seconds", "tpot": "tpot_seconds", "e2e": "e2e_seconds"}


def slo_limits(manifest: dict[str, Any]) -> dict[str, float]:
    """The limits that the run's config sets, in seconds, by `ttft`, `tpot`, `e2e`."""
    section = (manifest.get("config") or {}).get("slo") or {}
    return {key: float(section[key]) for key in KEYS if section.get(key) is not None}


def good_requests(run: RunFiles, limits: dict[str, float]) -> np.ndarray:
    """Bool per request: it finished by itself and kept every limit."""
    latencies = request_latencies(run)
    good = run.finished.copy()
    for key, limit in limits.items():
        good &= ~(latencies[KEYS[key]] > limit)  # NaN: one output token, which has no TPOT
    return good


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
    good = good_requests(run, limits)
    arrived, _ = in_window(run, steady)
    return {
        "limits": limits,
        "attainment_target": target,
        "whole_run": _attainment(good, duration, target),
        "steady": _attainment(good[arrived], steady.end - steady.start, target) if steady.found else None,
    }


def _attainment(good: np.ndarray, duration: float, target: float) -> dict[str, Any]:
    share = float(good.mean()) if len(good) else None
    low, high = wilson(int(good.sum()), len(good)) if len(good) else (None, None)
    return {
        "num_requests": len(good),
        "num_good": int(good.sum()),
        "attainment": share,
        "attainment_ci95_low": low,
        "attainment_ci95_high": high,
        "good_requests_per_second": float(good.sum()) / duration if duration > 0 else None,
        "met": None if share is None else share >= target,
    }


def wilson(num_good: int, count: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927); unlike a bootstrap's it is no point when all are good."""
    z2 = 1.959964**2
    share = num_good / count
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return max(0.0, center - half), min(1.0, center + half)


def limits_text(limits: dict[str, float]) -> str:
    """TTFT <= 2.00 s, TPOT <= 200 ms."""
    return ", ".join(f"{key.upper()} ≤ {seconds(limit)}" for key, limit in limits.items())


def slo_section(summary: dict[str, Any]) -> Section:
    """Attainment and goodput as a table."""
    slo = summary["slo"]
    rows = []
    for label, part in (("whole run", slo["whole_run"]), ("steady part", slo["steady"])):
        if part is not None:
            rows.append([label, f"{count(part['num_good'])} of {count(part['num_requests'])}",
                         percent(part["attainment"]), _interval(part), rate(part["good_requests_per_second"]),
                         DASH if part["met"] is None else "met" if part["met"] else "missed"])  # fmt: skip
    target = percent(slo["attainment_target"])
    table = Table(
        ["", "good requests", "attainment", "95 % interval", "goodput (requests/s)", f"{target} of requests"], rows,
        text_columns=frozenset({5}),
    )  # fmt: skip
    note = (
        f"Good: finished by itself with {limits_text(slo['limits'])}. Denominator: every request that arrived in the "
        "window, rejected and failed ones too. Goodput: good requests / the window's length (whole run: the duration). "
        "Intervals: Wilson's, over requests."
    )
    return Section("Service-level objective", [], [], [table], [note])


def _interval(part: dict[str, Any]) -> str:
    low, high = part["attainment_ci95_low"], part["attainment_ci95_high"]
    return DASH if low is None else f"{percent(low)} – {percent(high)}"
