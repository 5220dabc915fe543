"""Statistics of a workload's table, as published for traces: moments and quantiles of lengths, rate and burstiness."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.experiments.workloads.parts.base import FloatArray, IntArray, LengthTable

_WINDOW = 1.0


def table_statistics(table: LengthTable) -> dict[str, Any]:
    """Facts about a table. Quantiles are linear between order statistics; standard deviations are the population's.

    Returns:
        `num_requests`; `prompt_len` and `output_len`, each with mean, cv, min, p50, p90, p99, max (tokens); and where
        there are times `times`, with span (s), rate (requests / span), interval_cv (standard deviation over mean of the
        intervals), dispersion (variance over mean of the counts of 1-s windows), num_distinct and max_at_once.
    """
    facts: dict[str, Any] = {
        "num_requests": len(table),
        "prompt_len": _length_facts(table.prompt_lens),
        "output_len": _length_facts(table.output_lens),
    }
    if table.arrival_times is not None and table.arrival_times[-1] > 0:
        facts["times"] = _time_facts(table.arrival_times)
    if table.notes:
        facts["notes"] = list(table.notes)
    return facts


def _length_facts(lens: IntArray) -> dict[str, float]:
    mean = float(lens.mean())
    p50, p90, p99 = (float(value) for value in np.quantile(lens, [0.5, 0.9, 0.99]))
    return {
        "mean": mean,
        "cv": float(lens.std()) / mean,
        "min": int(lens.min()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": int(lens.max()),
    }


def _time_facts(times: FloatArray) -> dict[str, float | None]:
    span = float(times[-1] - times[0])
    gaps = np.diff(times)
    # Whole windows only: a last one that is cut short would count as quiet.
    counts = np.bincount((times / _WINDOW).astype(np.int64))[: int(span / _WINDOW)]
    at_once = np.unique(times, return_counts=True)[1]
    return {
        "span": span,
        "rate": len(times) / span,
        "interval_cv": float(gaps.std() / gaps.mean()),
        "dispersion": float(counts.var() / counts.mean()) if len(counts) > 1 and counts.any() else None,
        "num_distinct": len(at_once),
        "max_at_once": int(at_once.max()),
    }
