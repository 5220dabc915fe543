"""Per-request latencies and their statistics. Every definition that a report prints stands here, once.

    arrival (scheduled) ---- queue ---- admission ---- prefill ---- first token -- ITL -- token -- ... -- finish
    |<------------------------------ TTFT ------------------------------>|
    |<------------------------------------------ E2E ------------------------------------------------------>|

Definitions follow vLLM's `bench serve` (TPOT, ITL) and Orca / PagedAttention (normalised latency), except that
latencies count from the *scheduled* arrival: a load generator that falls behind cannot hide a queue.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kvarena.reports.reading.files import RunFiles, flat

PERCENTILES = (50, 90, 95, 99)
MAX_GAPS = 10_000_000

DEFINITIONS = {
    "ttft_seconds": ("TTFT", "time to first token: first token on the host - scheduled arrival"),
    "tpot_seconds": (
        "TPOT",
        "time per output token: (last token - first token) / (output tokens - those that came with the first one, of "
        "an engine one) of a request; requests whose tokens came all at once are left out",
    ),
    "itl_seconds": ("ITL", "inter-token latency: every gap between consecutive tokens of a request, pooled"),
    "e2e_seconds": ("E2E", "end-to-end latency: finish - scheduled arrival"),
    "queue_time_seconds": ("Queue", "queue time: start of the first step that computed one of the request's tokens - "
                           "scheduled arrival"),
    "normalized_latency_seconds_per_token": (
        "Norm. latency",
        "normalised latency: E2E / output tokens of a request (the y-axis of Orca and PagedAttention)",
    ),
}  # fmt: skip


def describe(values: np.ndarray) -> dict[str, float | int | None]:
    """Count, mean, percentiles (linear interpolation between order statistics), min and max; NaN is left out.

    With no value at all every statistic is None.
    """
    values = values[~np.isnan(values)]
    names = ("mean", *(f"p{p}" for p in PERCENTILES), "min", "max")
    if not len(values):
        return {"count": 0} | dict.fromkeys(names)
    quantiles = np.percentile(values, PERCENTILES, method="linear")
    stats = (values.mean(), *quantiles, values.min(), values.max())
    return {"count": len(values)} | {name: float(value) for name, value in zip(names, stats, strict=True)}


def request_latencies(run: RunFiles) -> dict[str, np.ndarray]:
    """Per-request latencies in seconds, keyed as in DEFINITIONS; NaN where a request has none.

    Only requests that finished by themselves (`stop`, `length`) have latencies; the queue time is known of every
    request that was admitted.
    """
    req = run.requests
    num_output = np.where(run.finished, req["num_output_tokens"], 0).astype(float)
    ttft = np.where(run.finished, req["first_token_time"] - req["arrival_time"], np.nan)
    e2e = np.where(run.finished, req["finish_time"] - req["arrival_time"], np.nan)
    # Over HTTP an answer's end may come after its last token, and its first chunk may bring several.
    last = req.get("last_token_time", req["finish_time"])
    spread = np.where(run.finished, last - req["first_token_time"], np.nan)
    num_later = num_output - req.get("num_first_tokens", 1)
    later, some = num_later > 0, num_output > 0
    return {
        "ttft_seconds": ttft,
        "tpot_seconds": np.divide(spread, num_later, out=np.full_like(e2e, np.nan), where=later),
        "e2e_seconds": e2e,
        "queue_time_seconds": req["admission_time"] - req["arrival_time"],
        "normalized_latency_seconds_per_token": np.divide(e2e, num_output, out=np.full_like(e2e, np.nan), where=some),
    }


class TokenGaps(NamedTuple):
    """Gaps in seconds between consecutive tokens of a request, pooled.

    Attributes:
        values: the gaps.
        stride: they are those of every stride-th finished request; 1 but for very long runs.
    """

    values: np.ndarray
    stride: int


def token_gaps(run: RunFiles, max_gaps: int = MAX_GAPS) -> TokenGaps:
    """The gaps of the finished requests; with more than `max_gaps` of them, those of every so many-th request."""
    rows = np.flatnonzero(run.finished)
    total = int(run.requests["num_output_tokens"][rows].sum())
    stride = max(1, -(-total // max_gaps))
    return TokenGaps(gaps_within(run.lists("token_times", rows[::stride])), stride)


def gaps_within(times: pa.LargeListArray) -> np.ndarray:
    """Differences of neighbours in each list, end to end."""
    owner = times.value_parent_indices().to_numpy()
    return np.diff(flat(times))[owner[1:] == owner[:-1]]
