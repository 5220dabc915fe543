"""The KV ledger over time: weights, means, and time bins.

A step's ledger holds while the step runs. Its weight is the time in which it was the last step to end,

    weight = end - max(start, end of the previous step)

so that overlapped steps are not counted twice, and idle time (no step runs) is counted nowhere. Of several replicas
each has its own steps and its own time: means are over the time of all, rates add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvarena.engine.classes import CLASSES


class Spans(NamedTuple):
    """When each step counts: [start, end) in seconds; those of one replica in order, without overlap.

    Attributes:
        start, end: one a step.
        lanes: the steps of each replica, as indices; without any all are of one.
    """

    start: np.ndarray
    end: np.ndarray
    lanes: Sequence[np.ndarray | slice] = (slice(None),)

    @property
    def weight(self) -> np.ndarray:
        """Seconds per step."""
        return self.end - self.start


def step_spans(steps: dict[str, np.ndarray]) -> Spans:
    """The exclusive time of every step."""
    number = len(steps["end_time"])
    replicas = steps.get("replica", np.zeros(number, dtype=np.int32))
    lanes = tuple(np.flatnonzero(replicas == one) for one in np.unique(replicas))
    start, end = np.empty(number), np.empty(number)
    for lane in lanes:
        last = np.maximum.accumulate(steps["end_time"][lane])
        before = np.concatenate([[-np.inf], last[:-1]])
        start[lane] = np.minimum(np.maximum(steps["start_time"][lane], before), last)
        end[lane] = last
    return Spans(start, end, lanes)


def weighted_mean(values: np.ndarray, weight: np.ndarray) -> float | None:
    """Time-weighted mean; the plain mean when no time passed; None without steps."""
    if not len(values):
        return None
    total = weight.sum()
    return float((values * weight).sum() / total) if total > 0 else float(values.mean())


def mean_shares(steps: dict[str, np.ndarray], spans: Spans, window: np.ndarray | None = None) -> dict | None:
    """Mean share of the pool of each ledger class.

    Args:
        steps: the step columns.
        spans: their exclusive times.
        window: bool per step: which ones count; None counts all.

    Returns:
        class -> share in [0, 1], adding up to 1; None when the window holds no step.
    """
    window = np.ones(len(spans.start), dtype=bool) if window is None else window
    if not window.any():
        return None
    total, weight = steps["total"][window].astype(float), spans.weight[window]
    return {name: weighted_mean(steps[name][window] / total, weight) for name in CLASSES}


class Bins(NamedTuple):
    """Time bins for a figure.

    Attributes:
        edges: bin edges in seconds, [num_bins + 1].
        busy: seconds of step time in each bin, [num_bins].
    """

    edges: np.ndarray
    busy: np.ndarray


def make_bins(spans: Spans, num_bins: int, end: float | None = None) -> Bins:
    """Equal bins from 0 to `end` (by default the end of the last step)."""
    last = float(spans.end.max(initial=0.0))
    edges = np.linspace(0.0, max(last if end is None else end, 1e-9), num_bins + 1)
    return Bins(edges, _integral(np.ones(len(spans.start)), spans, edges))


def binned_mean(values: np.ndarray, spans: Spans, bins: Bins) -> np.ndarray:
    """Time-weighted mean of a per-step value in each bin; NaN where no step ran. O(steps + bins)."""
    integral = _integral(values, spans, bins.edges)
    # A sliver of a step in a bin is noise of the rounding, not a value.
    busy = bins.busy > 1e-6 * (bins.edges[1] - bins.edges[0])
    return np.divide(integral, bins.busy, out=np.full(len(integral), np.nan), where=busy)


def binned_rate(values: np.ndarray, spans: Spans, bins: Bins) -> np.ndarray:
    """Per-step counts as a rate per second of wall time in each bin, each count spread evenly over its step."""
    weight = spans.weight
    per_second = np.divide(values, weight, out=np.zeros(len(weight)), where=weight > 0)
    return _integral(per_second, spans, bins.edges) / np.diff(bins.edges)


def _integral(values: np.ndarray, spans: Spans, edges: np.ndarray) -> np.ndarray:
    """Integral over each bin of a function that is `values[i]` in span i and 0 elsewhere; over all replicas."""
    total = np.zeros(len(edges) - 1)
    for lane in spans.lanes:
        times = np.stack([spans.start[lane], spans.end[lane]], axis=1).ravel()
        area = np.cumsum((values * spans.weight)[lane])
        cumulative = np.stack([np.concatenate([[0.0], area[:-1]]), area], axis=1).ravel()
        total += np.diff(np.interp(edges, times, cumulative, left=0.0))
    return total
