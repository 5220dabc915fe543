"""Did two runs give the same tokens? The gate that every lossless strategy must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.paired import match_requests, same_prompts
from kvarena.reports.comparing.rounding import (
    ERROR,
    NOT_RECORDED,
    ROUNDING,
    Judgement,
    coarser_epsilon,
    judge,
    read_scores,
    typical_difference,
)
from kvarena.reports.reading.files import RunFiles

COUNTS = {ROUNDING: "num_rounding", ERROR: "num_errors", NOT_RECORDED: "num_not_recorded"}
SAME, DIFFERENT, UNDECIDED, NOT_COMPARED = "same", "different", "not decided", "not compared"
GOOD = (SAME, ROUNDING, NOT_COMPARED)  # verdicts that are no warning
REMEDY = "was not recorded: driver.scores=8 records it"
NO_REMEDY = "is not known: a server shows no scores"


def compare_tokens(run: RunFiles, reference: RunFiles) -> dict[str, Any]:
    """Compare `output_token_ids` by request id, over the requests that finished by themselves in both runs
    and whose tokens both runs recorded.

    Returns:
        `num_compared`, `num_tokens_compared`, `num_different`; of these `num_rounding`, `num_errors` and
        `num_not_recorded`, as each request's first differing token was judged (reports/comparing/rounding.py; in
        float32 every difference is an error); `largest_gap` and `largest_difference` of those judged, in units of the
        scores, and the `typical_difference` of scores with equal prefixes;
        `first_divergence` (None when all agree): request id, output position, and the two tokens there (None where one
        output is shorter); `over_http`: one of them is a server's; `num_rejected_in_one`: requests that exactly one of
        the two runs rejected, which are not compared.
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
        **dict.fromkeys(COUNTS.values(), 0),
        "largest_gap": None,
        "largest_difference": None,
        "typical_difference": None,
        "first_divergence": None,
        "over_http": bool(run.manifest.get("target") or reference.manifest.get("target")),
        "num_rejected_in_one": int((rejected != reference_rejected).sum()),
    }
    if np.array_equal(rows, reference_rows) and run.digest("output_token_ids") == reference.digest("output_token_ids"):
        return result
    ours = run.lists("output_token_ids", rows)
    theirs = reference.lists("output_token_ids", reference_rows)
    if ours.equals(theirs):
        return result
    found, lengths = [], {}
    for row, *outputs in zip(rows, ours, theirs, strict=True):
        one, other = (output.values.to_numpy() for output in outputs)
        request_id = str(run.requests["request_id"][row])
        position = _divergence(one, other)
        lengths[request_id] = len(one) if position is None else position
        if position is not None:
            found.append((position, request_id, _token(one, position), _token(other, position)))
    return result | _judged(run, reference, found, lengths)


def _judged(
    run: RunFiles,
    reference: RunFiles,
    found: Sequence[tuple[int, str, int | None, int | None]],
    lengths: Mapping[str, int],
) -> dict[str, Any]:
    """The counts of the first differing tokens.

    Args:
        run, reference: the two runs.
        found: of each request that differs the position, its id, and the two tokens.
        lengths: of each request that was compared, the tokens that the outputs have in common at their start.
    """
    epsilon = coarser_epsilon(run, reference)
    scores, others = (read_scores(run), read_scores(reference)) if epsilon else (None, None)
    typical = None if scores is None or others is None else typical_difference(scores, others, lengths)
    judgements = []
    for position, request_id, token, other in found:
        if token is None or other is None or epsilon == 0.0:  # rounding never ends an output
            judgements.append(Judgement(ERROR))
        elif scores is None or others is None or epsilon is None:
            judgements.append(Judgement(NOT_RECORDED))
        else:
            candidates = scores.at(request_id, position), others.at(request_id, position)
            judgements.append(judge(*candidates, token, other, epsilon, typical))
    counts = Counter(judgement.verdict for judgement in judgements)
    position, request_id, token, other = min(found, key=lambda entry: entry[0])
    return {
        "num_different": len(found),
        **{name: counts[verdict] for verdict, name in COUNTS.items()},
        "largest_gap": max((entry.gap for entry in judgements if entry.gap is not None), default=None),
        "largest_difference": max(
            (entry.difference for entry in judgements if entry.difference is not None), default=None
        ),
        "typical_difference": typical,
        "first_divergence": {
            "request_id": request_id,
            "position": position,
            "token_id": token,
            "reference_token_id": other,
        },
    }


def same_tokens(cells: Sequence[Cell]) -> dict[str, Any]:
    """Whether all cells of one workload gave the same tokens, and one line that says so.

    Cells are compared with the first cell that was asked the same (`asked_the_same`); cells without one are not.

    Returns:
        `verdict`: `same`; `rounding`, where all that differ do by rounding; `different`, where one is an error;
        `not decided`, where what would tell was not recorded; or `not compared`. `line`. `rounding`, `errors` and
        `not_recorded`: requests over all comparisons. `cells`: what `compare_tokens` gave.
    """
    compared: list[dict[str, Any]] = []
    references: list[Cell] = []
    for cell in cells:
        reference = next((other for other in references if asked_the_same(cell.run, other.run)), None)
        if reference is None:
            references.append(cell)
            continue
        compared.append(
            {"label": cell.run_label, "reference": reference.run_label} | compare_tokens(cell.run, reference.run)
        )
    totals = {name: sum(entry[name] for entry in compared) for name in ("num_compared", *COUNTS.values())}
    if totals["num_errors"]:
        verdict = DIFFERENT
    elif totals["num_not_recorded"]:
        verdict = UNDECIDED
    elif totals["num_rounding"]:
        verdict = ROUNDING
    else:
        verdict = SAME if totals["num_compared"] else NOT_COMPARED
    are_repeated = len({cell.contender for cell in cells}) < len(cells)
    line = tokens_line(compared, "runs" if are_repeated else "cells")
    if verdict == NOT_COMPARED and any(cell.is_simulated for cell in cells):
        line = "Tokens were not compared: simulated runs compute none."
    elif verdict == NOT_COMPARED and (without := sum(not _has_tokens(cell.run) for cell in cells)):
        line = f"Tokens were not compared: {without} of {len(cells)} runs recorded none (driver.record=summary)."
    return {
        "verdict": verdict,
        "line": line,
        "rounding": totals["num_rounding"],
        "errors": totals["num_errors"],
        "not_recorded": totals["num_not_recorded"],
        "cells": compared,
    }


def _has_tokens(run: RunFiles) -> bool:
    return not run.num_requests or bool(run.list_lengths("prompt_token_ids").any())


def asked_the_same(run: RunFiles, other: RunFiles) -> bool:
    """Whether two runs should give the same tokens: the same prompts, model, sampling and random streams.

    What one of them does not say (a server's engine has settings of its own) is not held against it.
    """
    for section, keys in (("sampling", None), ("model", ("path", "shape", "load_format")), ("engine", ("seed",))):
        one, another = (run.manifest["config"].get(section), other.manifest["config"].get(section))
        if isinstance(one, dict) and isinstance(another, dict):
            names = (one.keys() & another.keys()) if keys is None else keys
            if any(one.get(name) != another.get(name) for name in names):
                return False
    return same_prompts(run, other)


def tokens_line(compared: Sequence[dict[str, Any]], noun: str = "cells") -> str:
    """One line for what `compare_tokens` found, with the labels of the two cells in each entry.

    Args:
        compared: see above.
        noun: what was compared: cells, or the runs that repeat them.
    """
    usable = [entry for entry in compared if entry["num_compared"]]
    different = [entry for entry in compared if entry["num_different"]]
    rejected = sum(1 for entry in compared if entry["num_rejected_in_one"])
    apart = (
        f" Requests that one cell rejected and another served ({rejected} cell(s)) are left out." if rejected else ""
    )
    if different:
        return f"{_difference_line(usable, different)}{apart}"
    if not usable:
        return "Tokens were not compared: no two cells finished the same request."
    references = dict.fromkeys(entry["reference"] for entry in compared)  # one per workload, such as a seed's
    requests, tokens = (
        sum(max(entry[key] for entry in compared if entry["reference"] == reference) for reference in references)
        for key in ("num_compared", "num_tokens_compared")
    )
    cells = len(compared) + len(references)
    return f"All {cells} {noun} gave the same tokens ({requests:,} requests, {tokens:,} output tokens).{apart}"


def _difference_line(usable: Sequence[dict[str, Any]], different: Sequence[dict[str, Any]]) -> str:
    names = ("num_different", "num_compared", *COUNTS.values())
    differ, total, rounding, errors, missing = (sum(entry[name] for entry in usable) for name in names)
    where = f" over {len(usable)} comparisons" if len(usable) > 1 else ""
    text = f"Tokens differ in {differ:,} of {total:,} requests{where}"
    remedy = NO_REMEDY if all(entry["over_http"] for entry in different if entry["num_not_recorded"]) else REMEDY
    if missing == differ:
        text += f"; whether by rounding {remedy}."
    else:
        text += f", judged at each one's first differing token: {rounding:,} by rounding, {errors:,} by errors"
        text += f"; of {missing:,} it {remedy}." if missing else "."
    if not errors and not missing:
        return text
    worst = min(different, key=lambda entry: (not entry["num_errors"], entry["first_divergence"]["position"]))
    first = worst["first_divergence"]
    return (
        f"{text} First divergence: {worst['label']} against {worst['reference']}, request {first['request_id']}, "
        f"output token {first['position']} ({first['token_id']} instead of {first['reference_token_id']})."
    )


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
