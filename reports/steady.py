r"""The steady part of a run: ramp and drain left out by a stated rule.

    N(t)  |        ____/\__/\____/\__
          |    ___/                   \__
          |__ /                          \___
          first arrival  start      last arrival = end

N(t) is the number of requests in the system: arrived and not yet ended. The drain is cut at the last scheduled arrival.
The ramp is cut by MSER-5 (White, Cobb and Spratt, "A comparison of five steady-state truncation heuristics for
simulation", WSC 2000): of all starts in the first half, the one with which the mean of what remains has the smallest
standard error. Where N(t) still has a trend there (the engine is overloaded, or the run too short to tell), the run has
no steady part: the means of the first and the last third differ by more than a third of the whole's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reports.document import Section, Table
from reports.files import RunFiles
from reports.format import count, percent, rate, seconds
from reports.latency import describe, request_latencies

BATCH = 5
NUM_BATCHES = 100
MAX_TREND = 1 / 3  # between the first and the last third, as a share of the mean
MIN_REQUESTS = 20
LATENCIES = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
DEFINITION = (
    "from the start that MSER-5 chooses on the number of requests in the system "
    f"({BATCH * NUM_BATCHES} samples in batches of {BATCH}, at most half of them cut) to the last scheduled arrival; "
    "latencies are those of the requests that arrived in it, throughput that of the requests that finished in it"
)


class SteadyWindow(NamedTuple):
    """A window in seconds since the run's start, or the reason why there is none."""

    start: float
    end: float
    reason: str = ""

    @property
    def found(self) -> bool:
        """Whether the run has a steady part."""
        return not self.reason


def steady_window(run: RunFiles) -> SteadyWindow:
    """Find the steady part of a run from its requests' arrivals and ends alone."""
    arrivals = np.sort(run.requests["arrival_time"])
    nowhere = (float("nan"), float("nan"))
    if run.finished.sum() < MIN_REQUESTS:
        return SteadyWindow(*nowhere, f"fewer than {MIN_REQUESTS} requests finished")
    first, last = float(arrivals[0]), float(arrivals[-1])
    if last <= first:
        return SteadyWindow(*nowhere, "all requests arrived at once")
    edges = np.linspace(first, last, BATCH * NUM_BATCHES + 1)
    ends = np.sort(run.requests["finish_time"][~np.isnan(run.requests["finish_time"])])
    middle = (edges[1:] + edges[:-1]) / 2
    in_system = np.searchsorted(arrivals, middle, "right") - np.searchsorted(ends, middle, "right")
    cut = mser(in_system.reshape(NUM_BATCHES, BATCH).mean(axis=1))
    if cut is None:
        return SteadyWindow(*nowhere, "the number of requests in the system has a trend (overload, or too short a run)")
    return SteadyWindow(float(edges[cut * BATCH]), last)


def mser(values: np.ndarray) -> int | None:
    """How many leading values to leave out, at most half; None where what remains still has a trend.

    Args:
        values: a series in order of time.
    """
    remaining = [values[cut:] for cut in range(len(values) // 2 + 1)]
    cut = int(np.argmin([float(((rest - rest.mean()) ** 2).sum()) / len(rest) ** 2 for rest in remaining]))
    rest = remaining[cut]
    third = len(rest) // 3
    trend = abs(float(rest[-third:].mean() - rest[:third].mean()))
    return None if trend > MAX_TREND * abs(float(rest.mean())) else cut


def summarize_steady(run: RunFiles, window: SteadyWindow) -> dict[str, Any]:
    """The numbers of the steady part; all are None where there is none."""
    arrived, ended = in_window(run, window)
    length = window.end - window.start
    latencies = request_latencies(run)
    done = int(ended.sum())
    tokens = int(run.requests["num_output_tokens"][ended].sum())
    return {
        "found": window.found,
        "reason": window.reason or None,
        "start_seconds": window.start if window.found else None,
        "end_seconds": window.end if window.found else None,
        "num_requests": int(arrived.sum()),
        "num_finished": done,
        "requests_per_second": done / length if window.found else None,
        "output_tokens_per_second": tokens / length if window.found else None,
    } | {name: describe(latencies[name][arrived]) for name in LATENCIES}


def in_window(run: RunFiles, window: SteadyWindow) -> tuple[np.ndarray, np.ndarray]:
    """Bool per request: it arrived in the window; it finished by itself in the window."""
    arrival, finish = run.requests["arrival_time"], run.requests["finish_time"]
    arrived = (arrival >= window.start) & (arrival <= window.end)
    return arrived, run.finished & (finish >= window.start) & (finish <= window.end)


def steady_section(summary: dict[str, Any]) -> Section:
    """The steady part beside the whole run."""
    steady = summary["steady"]
    if not steady["found"]:
        text = f"This run has no steady part: {steady['reason']}. All numbers are of the whole run, ramp and drain."
        return Section("Steady part", [text], [], [])
    length = steady["end_seconds"] - steady["start_seconds"]
    rows = [
        ["window", f"0 s – {seconds(summary['duration_seconds'])}",
         f"{seconds(steady['start_seconds'])} – {seconds(steady['end_seconds'])}"],
        ["share of the duration", percent(1.0), percent(length / summary["duration_seconds"])],
        ["requests that arrived", count(summary["num_requests"]), count(steady["num_requests"])],
        ["requests that finished", count(summary["num_finished"]), count(steady["num_finished"])],
        *([label, rate(summary[key]), rate(steady[key])]
          for label, key in (("requests/s", "requests_per_second"), ("output tokens/s", "output_tokens_per_second"))),
        *([f"{label} {name}", seconds(summary[key][name]), seconds(steady[key][name])]
          for label, key in zip(("TTFT", "TPOT", "E2E"), LATENCIES, strict=True) for name in ("p50", "p99")),
    ]  # fmt: skip
    return Section("Steady part", [], [], [Table(["", "whole run", "steady part"], rows)], [f"Steady: {DEFINITION}."])
