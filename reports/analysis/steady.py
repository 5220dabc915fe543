r"""The steady part of a run, where it has one: ramp and drain left out by a stated rule.

    N(t)  |        ____/\__/\____/\__
          |    ___/                   \__
          |__ /                          \___
          first arrival  start      last arrival = end

Two counts are looked at, from the first to the last scheduled arrival: W(t), requests that arrived and were not yet
admitted, and N(t), requests in the system. The trend of a count is its growth over the standard error of that growth,
by its increments over 40 equal spans of time: in an overloaded queue these are independent and add up, in a stable one
what grew is lost again, so that the statistic stays far below that of chance. Three answers:

    overloaded    the trend of W is above 2: the queue grows, and no part of the run is steady
    steady        W was 0 at an arrival of the second half, and the trends of W, and of N in that half, are at most 2
    cannot tell   neither

The drain is cut at the last scheduled arrival, the ramp by MSER-5 (White, Cobb and Spratt, "A comparison of five
steady-state truncation heuristics for simulation", WSC 2000): of all starts in the first half, the one with which the
mean of N over what remains has the smallest standard error. How often the rule errs on queues of known load:
`kvarena check steady_rates`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvarena.reports.analysis.latency import describe, request_latencies
from kvarena.reports.drawing.document import Section, Table
from kvarena.reports.drawing.format import count, percent, rate, seconds
from kvarena.reports.reading.files import RunFiles

BATCH = 5
NUM_BATCHES = 100
NUM_SPANS = 40
GROWING = 2.0  # trend above which a count grows by more than chance
MIN_REQUESTS = 100  # with fewer an overloaded queue has not grown by more than chance
LATENCIES = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
DEFINITION = (
    "the queue was empty at some arrival of the second half, and neither it nor the number of requests in the system "
    f"grows by more than {GROWING:g} standard errors; from the start that MSER-5 chooses on the number in the system "
    f"({BATCH * NUM_BATCHES} samples in batches of {BATCH}, at most half of them cut) to the last scheduled arrival; "
    "latencies are those of the requests that arrived in it, throughput that of the requests that finished in it"
)
NO_PART = {
    "overloaded": "Overloaded, so that this run has no steady part",
    "cannot tell": "Whether this run has a steady part cannot be told",
    "does not apply": "A steady part is not looked for",
}


class SteadyWindow(NamedTuple):
    """A window in seconds since the run's start, or why there is none.

    Attributes:
        start: NaN where there is none.
        end: the same.
        reason: why there is none; empty where there is one.
        verdict: `steady`, `overloaded`, `cannot tell`, or `does not apply` (no open-loop arrivals).
    """

    start: float
    end: float
    reason: str = ""
    verdict: str = "steady"

    @property
    def found(self) -> bool:
        """Whether the run has a steady part."""
        return not self.reason


def steady_window(run: RunFiles) -> SteadyWindow:
    """Find the steady part of a run from its requests' arrivals, admissions and ends."""
    req = run.requests
    if (run.manifest.get("arrival") or {}).get("name") == "closed_loop":
        return _nowhere("does not apply", "users wait for their answers, so that no queue can grow (closed loop)")
    there = req["finish_reason"] != "rejected"
    admitted = req["admission_time"]
    if np.isnan(admitted[run.finished]).any():  # a server does not say when it admitted a request
        admitted = req["first_token_time"]
    admitted = np.where(np.isnan(admitted), req["finish_time"], admitted)  # whoever ended waits no longer
    if len(req["arrival_time"]) and float(np.ptp(req["arrival_time"])) == 0:
        return _nowhere("does not apply", "all requests arrived at once")
    if run.finished.sum() < MIN_REQUESTS:
        return _nowhere("cannot tell", f"fewer than {MIN_REQUESTS} requests finished")
    return find_steady(req["arrival_time"][there], admitted[there], req["finish_time"][there])


def find_steady(arrival: np.ndarray, admission: np.ndarray, finish: np.ndarray) -> SteadyWindow:
    """The rule of this module.

    Args:
        arrival: scheduled, in seconds, not all equal; in any order.
        admission: when each request left the queue; NaN: never.
        finish: when each one left the system; NaN: never.
    """
    arrived = np.sort(arrival)
    left_queue, left = (np.sort(times[~np.isnan(times)]) for times in (admission, finish))
    first, last = float(arrived[0]), float(arrived[-1])
    middle = (first + last) / 2

    def present(times: np.ndarray, gone: np.ndarray) -> np.ndarray:
        return np.searchsorted(arrived, times, "right") - np.searchsorted(gone, times, "right")

    queue_trend = trend(present(np.linspace(first, last, NUM_SPANS + 1), left_queue))
    if queue_trend > GROWING:
        grown = int(present(np.array([last]), left_queue)[0])
        return _nowhere(
            "overloaded",
            f"the queue grows, by {queue_trend:.1f} standard errors to {count(grown)} requests at the last arrival",
        )
    system_trend = trend(present(np.linspace(middle, last, NUM_SPANS + 1), left))
    late = arrived >= middle
    before = np.arange(len(arrived)) - np.searchsorted(left_queue, arrived, "left")
    if system_trend > GROWING:
        return _nowhere("cannot tell", f"the number in the system grows, by {system_trend:.1f} standard errors")
    if not (before[late] <= 0).any():
        return _nowhere("cannot tell", "the queue was never empty in the second half of the arrivals")
    edges = np.linspace(first, last, BATCH * NUM_BATCHES + 1)
    in_system = present((edges[1:] + edges[:-1]) / 2, left)
    return SteadyWindow(float(edges[mser(in_system.reshape(NUM_BATCHES, BATCH).mean(axis=1)) * BATCH]), last)


def _nowhere(verdict: str, reason: str) -> SteadyWindow:
    return SteadyWindow(float("nan"), float("nan"), reason, verdict)


def trend(values: np.ndarray) -> float:
    """Growth of a series over its standard error by the increments, as if these were independent; 0 for a constant."""
    steps = np.diff(values)
    spread = float(steps.std(ddof=1))
    if spread == 0:
        return 0.0 if not steps.any() else float(np.sign(steps[0]) * np.inf)
    return float(steps.sum() / (spread * len(steps) ** 0.5))


def mser(values: np.ndarray) -> int:
    """How many leading values to leave out, at most half.

    Args:
        values: a series in order of time.
    """
    remaining = [values[cut:] for cut in range(len(values) // 2 + 1)]
    return int(np.argmin([float(((rest - rest.mean()) ** 2).sum()) / len(rest) ** 2 for rest in remaining]))


def summarize_steady(run: RunFiles, window: SteadyWindow) -> dict[str, Any]:
    """The numbers of the steady part; all are None where there is none."""
    arrived, ended = in_window(run, window)
    length = window.end - window.start
    latencies = request_latencies(run)
    done = int(ended.sum())
    tokens = int(run.requests["num_output_tokens"][ended].sum())
    return {
        "found": window.found,
        "verdict": window.verdict,
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
        text = f"{NO_PART[steady['verdict']]}: {steady['reason']}. All numbers are of the whole run, ramp and drain."
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
