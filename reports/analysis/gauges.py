"""A target's own gauges over the run (gauges.parquet): how full it was, and how many ran and waited."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvarena.engine.classes import CLASSES
from kvarena.reports.drawing.document import Picture, Section, Table
from kvarena.reports.drawing.format import count, percent, rate
from kvarena.reports.drawing.style import (
    BLUE,
    CLASS_LOOKS,
    RED,
    WIDE,
    Sheet,
    grid,
    hatch_kwargs,
    legend_above,
    new_figure,
    whole,
)
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.files import RunFiles, read_table
from kvarena.reports.reading.names import GAUGES_FILE


def read_gauges(run: RunFiles) -> dict[str, np.ndarray] | None:
    """The columns of gauges.parquet, NaN where the server had no such gauge; None without the file."""
    path = run.path / GAUGES_FILE
    if not path.exists():
        return None
    table = read_table(path, names_of(GAUGES_FILE))
    return {name: table.column(name).to_numpy().astype(float) for name in table.column_names}


def summarize_gauges(gauges: dict[str, np.ndarray] | None) -> dict[str, Any] | None:
    """Means and peaks over the readings; counters as what they grew by between the first and the last."""
    if gauges is None:
        return None
    queries, hits = _growth(gauges["prefix_queries"]), _growth(gauges["prefix_hits"])
    return {
        "num_readings": len(gauges["time"]),
        "kv_usage": _mean_and_peak(gauges["kv_usage"]),
        "num_running": _mean_and_peak(gauges["num_running"]),
        "num_waiting": _mean_and_peak(gauges["num_waiting"]),
        "num_preemptions": _growth(gauges["num_preemptions"]),
        "prefix_hit_rate": hits / queries if hits is not None and queries else None,
    }


def _mean_and_peak(values: np.ndarray) -> dict[str, float] | None:
    known = values[~np.isnan(values)]
    return {"mean": float(known.mean()), "max": float(known.max())} if len(known) else None


def _growth(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) else None


def gauges_figure(gauges: dict[str, np.ndarray], sheet: Sheet = WIDE) -> Figure:
    """How full the pool was, by ledger class where the server tells; below it the requests that ran and waited."""
    figure = new_figure(4.2, sheet)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1.2])
    time = gauges["time"]
    total = np.sum([gauges[name] for name in CLASSES], axis=0)
    if np.isfinite(total).all() and (total > 0).all():
        base = np.zeros(len(time))
        for name in CLASSES:
            share = 100 * gauges[name] / total
            if share.any():
                look = CLASS_LOOKS[name]
                top.fill_between(time, base, base + share, label=look.label, step="post", **hatch_kwargs(look))
            base = base + share
        handles, labels = top.get_legend_handles_labels()
        legend_above(figure, handles, labels, sheet)
        top.set_ylabel("share of the KV pool (%)")
    else:
        top.set_ylabel("KV pool in use (%)")
        top.plot(time, 100 * gauges["kv_usage"], color=BLUE, drawstyle="steps-post")
        grid(top)
    top.set_ylim(0, 100)
    for column, label, color, dash in (
        ("num_running", "running", BLUE, "-"),
        ("num_waiting", "waiting", RED, (0, (3, 1.2))),
    ):
        bottom.plot(time, gauges[column], color=color, linestyle=dash, label=label, drawstyle="steps-post")
    bottom.set_ylabel("requests")
    bottom.set_ylim(bottom=0)
    whole(bottom)
    grid(bottom)
    bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    bottom.set_xlabel("time since the start of the run (s)")
    bottom.set_xlim(time[0], max(time[-1], time[0] + 1e-3))
    figure.align_ylabels()
    return figure


def gauges_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """What the target said of itself."""
    gauges, facts = summary["gauges"], (summary["target"] or {}).get("gauges") or {}
    rows = [
        [label, rate_of(entry["mean"]), rate_of(entry["max"])]
        for label, key, rate_of in (
            ("KV pool in use", "kv_usage", percent),
            ("requests running", "num_running", rate),
            ("requests waiting", "num_waiting", rate),
        )
        if (entry := gauges[key])
    ]
    text = [
        f"The server's own gauges, {count(gauges['num_readings'])} readings of {facts.get('url', 'its metrics')}"
        + (
            f"; {count(facts['num_failed'])} more brought nothing ({facts.get('error')})"
            if facts.get("num_failed")
            else ""
        )
        + "."
    ]
    if gauges["num_preemptions"] is not None:
        text.append(f"It preempted {count(round(gauges['num_preemptions']))} requests between the first and the last.")
    if gauges["prefix_hit_rate"] is not None:
        text.append(f"Its prefix cache answered {percent(gauges['prefix_hit_rate'])} of the prompt tokens asked for.")
    picture = Picture(
        "gauges",
        svg["gauges"],
        "The server's gauges over the run.",
        "KV pool in use and requests of the server over time",
    )
    return Section("The server", [" ".join(text)], [picture], [Table(["", "mean of the readings", "peak"], rows)])
