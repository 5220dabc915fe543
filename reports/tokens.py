"""Did two runs give the same tokens? The gate that every lossless strategy must pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from reports.files import RunFiles
from reports.paired import match_requests


def compare_tokens(run: RunFiles, reference: RunFiles) -> dict[str, Any]:
    """Compare `output_token_ids` by request id, over the requests that finished by themselves in both runs
    and whose tokens both runs recorded.

    Returns:
        `num_compared`, `num_tokens_compared`, `num_different`; `first_divergence` (None when all agree): request id,
        output position, and the two tokens there (None where one output is shorter); `num_rejected_in_one`: requests
        that exactly one of the two runs rejected, which are not compared.
    """
    rows, reference_rows = match_requests(run, reference)
    rejected = run.requests["finish_reason"][rows] == "rejected"
    reference_rejected = reference.requests["finish_reason"][reference_rows] == "rejected"
    both = run.finished[rows] & reference.finished[reference_rows]
    both &= _shown(run)[rows] & _shown(reference)[reference_rows]
    rows, reference_rows = rows[both], reference_rows[both]
    result: dict[str, Any] = {
        "num_compared": len(rows),
        "num_tokens_compared": int(reference.requests["num_output_tokens"][reference_rows].sum()),
        "num_different": 0,
        "first_divergence": None,
        "num_rejected_in_one": int((rejected != reference_rejected).sum()),
    }
    if np.array_equal(rows, reference_rows) and run.digest("output_token_ids") == reference.digest("output_token_ids"):
        return result
    ours = run.lists("output_token_ids", rows)
    theirs = reference.lists("output_token_ids", reference_rows)
    if ours.same(theirs):
        return result
    first: tuple[int, int] | None = None  # (position, index)
    for index in range(len(rows)):
        position = _divergence(ours[index], theirs[index])
        if position is None:
            continue
        result["num_different"] += 1
        if first is None or position < first[0]:
            first = (position, index)
    if first is not None:
        position, index = first
        result["first_divergence"] = {
            "request_id": str(run.requests["request_id"][rows[index]]),
            "position": position,
            "token_id": _token(ours[index], position),
            "reference_token_id": _token(theirs[index], position),
        }
    return result


def _shown(run: RunFiles) -> np.ndarray:
    """Bool per request: its output tokens are in the files (a summary has none, and not every server shows them).

    A simulated run's are made up: that two of them are the same says nothing.
    """
    if run.manifest.get("simulation"):
        return np.zeros(run.num_requests, dtype=bool)
    return (run.list_lengths("output_token_ids") > 0) | (run.requests["num_output_tokens"] == 0)


def _divergence(ours: np.ndarray, theirs: np.ndarray) -> int | None:
    """First position where two outputs differ; the shorter length when one is a prefix of the other."""
    length = min(len(ours), len(theirs))
    wrong = np.flatnonzero(ours[:length] != theirs[:length])
    if len(wrong):
        return int(wrong[0])
    return None if len(ours) == len(theirs) else length


def _token(tokens: np.ndarray, position: int) -> int | None:
    return int(tokens[position]) if position < len(tokens) else None
