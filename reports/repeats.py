"""Repeats: the same cell with other seeds. Here the intervals hold run-to-run noise too."""

from __future__ import annotations

from typing import Any

import numpy as np

from reports.cells import Cell, is_seed
from reports.document import Section, Table
from reports.format import DASH, count, rate, ratio
from reports.latency import DEFINITIONS, request_latencies
from reports.paired import LEVEL, SEED, match_requests, verdict_of

METRICS = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
MAX_RESAMPLES, MIN_RESAMPLES, MAX_DRAWS = 2000, 200, 20_000_000


def repeat_groups(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Cells that differ in a seed alone, by their common name; empty when no cell was repeated."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in cell.settings.items()
                if key not in ("allocator", "scheduler") and not is_seed(key) and value is not None]  # fmt: skip
        name = ", ".join([f"{cell.settings['allocator']} × {cell.settings['scheduler']}", *rest])
        groups.setdefault(name, []).append(cell)
    return groups if any(len(group) > 1 for group in groups.values()) else {}


def summarize_repeats(groups: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Per group: throughput over repeats, and paired latency ratios to the baseline with a two-level bootstrap."""
    return [
        {
            "name": name,
            "num_repeats": len(group),
            "output_tokens_per_second": _over_repeats([cell.summary["output_tokens_per_second"] for cell in group]),
            "output_tokens_per_second_ratio": _over_repeats([_throughput_ratio(cell) for cell in group]),
            "paired": {metric: two_level_ratio(_ratios(group, metric)) for metric in METRICS},
        }
        for name, group in groups.items()
    ]


def _throughput_ratio(cell: Cell) -> float | None:
    if cell.baseline is None or cell.is_baseline:
        return None
    ours, theirs = (one.summary["output_tokens_per_second"] for one in (cell, cell.baseline))
    return ours / theirs if ours is not None and theirs else None


def _over_repeats(values: list[float | None]) -> dict[str, Any]:
    """Mean, smallest and largest: with a handful of repeats the range says more than an interval would."""
    known = [value for value in values if value is not None]
    if not known:
        return {"count": 0, "mean": None, "min": None, "max": None}
    return {"count": len(known), "mean": float(np.mean(known)), "min": min(known), "max": max(known)}


def _ratios(group: list[Cell], metric: str) -> list[np.ndarray]:
    """Paired ratios to the baseline, one array per repeat that has a baseline of the same seed."""
    result = []
    for cell in group:
        base = cell.baseline
        if base is None or base is cell:
            continue
        ratios = request_ratios(cell, base, metric)
        if len(ratios):
            result.append(ratios)
    return result


def paired_latencies(cell: Cell, base: Cell, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A latency of the requests that both runs have, in each; NaN where a request has none."""
    rows, base_rows = match_requests(cell.run, base.run)
    return request_latencies(cell.run)[metric][rows], request_latencies(base.run)[metric][base_rows]


def request_ratios(cell: Cell, base: Cell, metric: str) -> np.ndarray:
    """Paired ratios of the requests that have the latency in both runs."""
    ours, theirs = paired_latencies(cell, base, metric)
    both = (ours > 0) & (theirs > 0)
    return ours[both] / theirs[both]


def two_level_ratio(repeats: list[np.ndarray], seed: int = SEED) -> dict[str, Any]:
    """Median paired ratio over all repeats, with a bootstrap that resamples repeats, and requests within each.

    Args:
        repeats: paired ratios, one array per repeat.
        seed: of the resampling.
    """
    total = sum(map(len, repeats))
    result: dict[str, Any] = {"num_repeats": len(repeats), "count": total}
    result["median_ratio"] = float(np.median(np.concatenate(repeats))) if total else None
    if len(repeats) < 2:
        return result | {"ci95_low": None, "ci95_high": None, "verdict": "too few repeats"}
    rng = np.random.default_rng(seed)
    num_resamples = int(np.clip(MAX_DRAWS // total, MIN_RESAMPLES, MAX_RESAMPLES))
    medians = np.empty(num_resamples)
    for index in range(num_resamples):
        chosen = rng.integers(0, len(repeats), len(repeats))
        medians[index] = np.median(np.concatenate([rng.choice(repeats[i], len(repeats[i])) for i in chosen]))
    tail = 50 * (1 - LEVEL)
    low, high = (float(bound) for bound in np.percentile(medians, [tail, 100 - tail], method="linear"))
    return result | {"ci95_low": low, "ci95_high": high, "verdict": verdict_of(low, high)}


def repeat_section(repeats: list[dict[str, Any]]) -> Section:
    """Repeats as tables."""
    rows, paired_rows = [], []
    for entry in repeats:
        speed, gain = entry["output_tokens_per_second"], entry["output_tokens_per_second_ratio"]
        rows.append([entry["name"], count(entry["num_repeats"]), rate(speed["mean"]),
                     f"{rate(speed['min'])} – {rate(speed['max'])}", ratio(gain["mean"]),
                     f"{ratio(gain['min'])} – {ratio(gain['max'])}" if gain["count"] else DASH])  # fmt: skip
        for metric, paired in entry["paired"].items():
            if paired["count"]:
                low, high = (ratio(paired[key]) for key in ("ci95_low", "ci95_high"))
                interval = f"{low} – {high}" if paired["ci95_low"] is not None else DASH
                numbers = [count(paired["num_repeats"]), count(paired["count"])]
                middle = ratio(paired["median_ratio"])
                paired_rows.append(
                    [entry["name"], DEFINITIONS[metric][0], middle, interval, *numbers, paired["verdict"]]
                )
    header = ["over seeds", "repeats", "output tok/s", "range", "ratio", "range"]
    tables = [Table(header, rows)]
    if paired_rows:
        header = ["against the baseline", "latency", "median ratio", "95 % interval", "repeats", "requests", "verdict"]
        tables.append(Table(header, paired_rows, text_columns=frozenset({1, 6})))
    note = (
        "Each repeat is paired with the baseline's run of the same seed. Intervals: bootstrap that resamples repeats, "
        "and requests within each, so they hold run-to-run noise too. Ranges: smallest and largest repeat."
    )
    return Section("Repeats", [], [], tables, [note])
