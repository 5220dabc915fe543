"""Per-request timelines: queue, prefill, decode, and the waits of preempted requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvarena.reports.drawing.panels import patches_above
from kvarena.reports.drawing.style import EMPTY, INK, WIDE, Look, Sheet, grid, hatch_kwargs, new_figure
from kvarena.reports.reading.files import RunFiles

MAX_ROWS = 96
PHASES = {
    "queue": Look("queue", EMPTY, text=INK),
    "prefill": Look("prefill", "#E69F00", "////"),
    "decode": Look("decode", "#0072B2"),
    "preempted": Look("preempted and recomputed", "#D55E00", "xxxx"),
}


class Phase(NamedTuple):
    """A stretch of a request's life: what, from, to (seconds), and the row of the request."""

    name: str
    start: float
    end: float
    row: int


def request_phases(run: RunFiles, rows: np.ndarray) -> list[Phase]:
    """The phases of those requests. Rejected requests have none; unfinished ones end with the run.

    The files say how often a request was preempted, not when. A preempted request waits for a token until it was
    admitted again and recomputed, so the longest waits between its tokens, one for each preemption, are taken.
    """
    req = run.requests
    end_of_run = float(run.steps["end_time"].max()) if run.num_steps else 0.0
    phases: list[Phase] = []
    for row, token_times in zip(rows, run.lists("token_times", rows), strict=True):
        if req["finish_reason"][row] == "rejected":
            continue
        arrival, admission = req["arrival_time"][row], req["admission_time"][row]
        first, finish = req["first_token_time"][row], req["finish_time"][row]
        end = end_of_run if np.isnan(finish) else finish
        if np.isnan(admission):
            phases.append(Phase("queue", arrival, end, int(row)))
            continue
        phases.append(Phase("queue", arrival, admission, int(row)))
        phases.append(Phase("prefill", admission, end if np.isnan(first) else first, int(row)))
        if not np.isnan(first):
            phases.append(Phase("decode", first, end, int(row)))
        phases += _preempted(row, admission, token_times.values.to_numpy(), int(req["num_preemptions"][row]))
    return [phase for phase in phases if phase.end > phase.start]


def _preempted(row: int, admission: float, tokens: np.ndarray, num_preemptions: int) -> list[Phase]:
    events = np.concatenate([[admission], tokens])
    if num_preemptions == 0 or len(events) < 2:
        return []
    longest = np.sort(np.argsort(np.diff(events))[::-1][:num_preemptions])
    return [Phase("preempted", float(events[i]), float(events[i + 1]), int(row)) for i in longest]


def timeline_rows(run: RunFiles) -> np.ndarray:
    """The requests to draw: all in order of arrival, or evenly spread ones of many."""
    order = np.argsort(run.requests["arrival_time"], kind="stable")
    if len(order) <= MAX_ROWS:
        return order
    return order[np.linspace(0, len(order) - 1, MAX_ROWS).round().astype(int)]


def timeline_figure(run: RunFiles, sheet: Sheet = WIDE) -> Figure:
    """A Gantt chart: one line per request, by arrival."""
    rows = timeline_rows(run)
    place = {int(row): position for position, row in enumerate(rows)}
    figure = new_figure(min(6.2, 1.3 + 0.055 * max(len(rows), 12)), sheet)
    axes = figure.subplots()
    phases = request_phases(run, rows)
    for name, look in PHASES.items():
        boxes = [_box(phase, place[phase.row]) for phase in phases if phase.name == name]
        axes.add_collection(PolyCollection(boxes, **hatch_kwargs(look)))
    patches_above(figure, [look for name, look in PHASES.items() if any(one.name == name for one in phases)], sheet)
    start = min((phase.start for phase in phases), default=0.0)
    axes.set_xlim(min(0.0, start), max((phase.end for phase in phases), default=1.0))
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    every = "" if len(rows) == run.num_requests else f", {len(rows)} of {run.num_requests:,}"
    axes.set_ylabel(f"requests by arrival{every}")
    axes.set_xlabel("time since the start of the run (s)")
    grid(axes, "x")
    return figure


def _box(phase: Phase, position: int) -> list[tuple[float, float]]:
    top, bottom = position - 0.38, position + 0.38
    return [(phase.start, top), (phase.end, top), (phase.end, bottom), (phase.start, bottom)]
