"""Per-request paired ratios between two runs of one workload, with a confidence interval of their median.

Each request is its own control: ratio = its latency in one run / its latency in the other. The interval covers the
choice of requests within this one pair of runs. It does not cover run-to-run noise; repeats do that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import bdtrik

from reports.files import RunFiles

NUM_RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
MIN_PAIRS = 6  # below, the extremes of the sample do not bracket the median with 95 %: 2 * 0.5**n > 0.05
SAME, LOWER, HIGHER, TOO_FEW = "no significant difference", "lower", "higher", "too few requests"


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The interval between two order statistics that holds the median with at least 95 %, whatever the distribution.

    The sign test inverted (Conover, Practical Nonparametric Statistics, section 3.2): of n independent values, the
    number below the median is binomial (n, 1/2), so ranks r and n + 1 - r bracket it but for 2 P(X < r). A bootstrap's
    interval is too narrow here: of 7 values it misses the median in 13 %, and of 30 in 8 %.

    Args:
        values: at least MIN_PAIRS.
    """
    count = len(values)
    rank = int(bdtrik((1 - LEVEL) / 2, count, 0.5)) + 1  # the largest r with P(X < r) of at most 2.5 %
    ordered = np.partition(values, (rank - 1, count - rank))
    return float(ordered[rank - 1]), float(ordered[count - rank])


def bootstrap_quantile(values: np.ndarray, quantile: float) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of a quantile, the order statistic of rank ceil(q n).

    A resample of n values with replacement is n uniform draws looked up in the sorted sample, so its order statistics
    are those of n uniforms, which follow a beta distribution. Drawing these directly gives the bootstrap distribution
    itself, without building a resample.
    """
    ordered = np.sort(values)
    count = len(ordered)
    rank = min(max(int(np.ceil(quantile * count)), 1), count)
    draws = np.random.default_rng(SEED).beta(rank, count + 1 - rank, NUM_RESAMPLES)
    return _interval(ordered[np.minimum((draws * count).astype(np.int64), count - 1)])


def bootstrap_mean(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean; beyond 10,000 values its normal limit, which is the same then."""
    count = len(values)
    if count > 10_000:
        half = 1.959964 * float(values.std()) / count**0.5
        return float(values.mean()) - half, float(values.mean()) + half
    rng = np.random.default_rng(SEED)
    weights = rng.multinomial(count, np.full(count, 1 / count), min(2000, max(200, 10_000_000 // count)))
    return _interval(weights @ values / count)


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail], method="linear")
    return float(low), float(high)


def verdict_of(low: float, high: float) -> str:
    """What a ratio's interval says."""
    return LOWER if high < 1 else HIGHER if low > 1 else SAME


def paired_ratio(values: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Median ratio of paired latencies, its interval and a verdict.

    Args:
        values: seconds, one per request; NaN where the request has none.
        baseline: the same requests in the other run.

    Returns:
        `count`, `median_ratio`, `ci95_low`, `ci95_high` (None with too few pairs) and `verdict`: `lower` or `higher`
        when the interval excludes 1, else `no significant difference`, or `too few requests`.
    """
    both = (values > 0) & (baseline > 0)  # NaN compares false
    ratios = values[both] / baseline[both]
    result: dict[str, Any] = {"count": len(ratios), "median_ratio": float(np.median(ratios)) if len(ratios) else None}
    if len(ratios) < MIN_PAIRS:
        return result | {"ci95_low": None, "ci95_high": None, "verdict": TOO_FEW}
    low, high = median_interval(ratios)
    return result | {"ci95_low": low, "ci95_high": high, "verdict": verdict_of(low, high)}


def match_requests(run: RunFiles, other: RunFiles) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the requests that both runs have, by request id, in the order of `run`."""
    ids, other_ids = run.requests["request_id"], other.requests["request_id"]
    if np.array_equal(ids, other_ids):
        rows = np.arange(len(ids))
        return rows, rows
    place = {request_id: row for row, request_id in enumerate(other_ids)}
    pairs = [(row, place[request_id]) for row, request_id in enumerate(ids) if request_id in place]
    matched = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return matched[:, 0], matched[:, 1]


def same_prompts(run: RunFiles, other: RunFiles) -> bool:
    """Whether both runs were asked the same: every shared request id has the same prompt, and there is one."""
    rows, other_rows = match_requests(run, other)
    lengths, other_lengths = run.requests["num_prompt_tokens"][rows], other.requests["num_prompt_tokens"][other_rows]
    if not len(rows) or not np.array_equal(lengths, other_lengths):
        return False
    if len(rows) == run.num_requests == other.num_requests and (rows == other_rows).all():
        return run.digest("prompt_token_ids") == other.digest("prompt_token_ids")
    return run.lists("prompt_token_ids").take(rows).same(other.lists("prompt_token_ids").take(other_rows))
