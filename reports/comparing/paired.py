"""Requests of two runs of one workload, side by side.

Each request is its own control: ratio = its latency in one run / its latency in the other. The ratios of one pair of
runs share these runs' noise and queues, so their spread is described and no verdict rests on it:
reports/comparing/verdicts.py asks repeats.
"""

from __future__ import annotations

import numpy as np

from kvarena.reports.reading.files import RunFiles


def request_ratios(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Ratios of the requests that have the latency in both runs.

    Args:
        values: seconds, one per request; NaN where the request has none.
        baseline: the same requests in the other run.
    """
    both = (values > 0) & (baseline > 0)  # NaN compares false
    return values[both] / baseline[both]


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
    return bool(run.lists("prompt_token_ids", rows).equals(other.lists("prompt_token_ids", other_rows)))
