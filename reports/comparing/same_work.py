"""Cells that served different requests: what each one lost, and all of them over the requests that every one served.

A cell that rejects the longest requests, or whose outputs stop earlier, does less work and looks fast. So wherever the
cells of one baseline did not finish the same requests with the same number of tokens, throughput and latency are given
a second time over those that all finished. The load of the other requests was there too: this is a comparison of the
same work under each cell's own load, not a run without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvarena.reports.analysis.latency import describe, request_latencies
from kvarena.reports.comparing.cells import Cell
from kvarena.reports.drawing.document import Section, Table
from kvarena.reports.drawing.format import count, rate, ratio, seconds

LATENCIES = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
LOST = {"num_rejected": "rejected", "num_failed": "failed", "num_aborted": "aborted"}


def compare_same_work(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The groups of cells (a baseline and those that are compared with it) that did different work.

    Returns:
        Of each: `baseline`, `num_requests` (most that a cell was asked), `num_common` (finished by all),
        `num_other_lengths` (of these, with different numbers of output tokens) and `cells`.
    """
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.baseline is not None:
            groups.setdefault(id(cell.baseline), []).append(cell)
    found = [_compare(group) for group in groups.values() if len(group) > 1]
    return [entry for entry in found if entry is not None]


def _compare(group: list[Cell]) -> dict[str, Any] | None:
    finished = [_rows_of_finished(cell) for cell in group]
    common = set.intersection(*(set(rows) for rows in finished))
    ids = [request_id for request_id in finished[0] if request_id in common]
    rows = [np.array([found[request_id] for request_id in ids], dtype=np.int64) for found in finished]
    lengths = [cell.run.requests["num_output_tokens"][own] for cell, own in zip(group, rows, strict=True)]
    other = int(np.any([one != lengths[0] for one in lengths], axis=0).sum()) if ids else 0
    if all(len(found) == len(ids) for found in finished) and not other:
        return None
    entries = [_cell(cell, own) for cell, own in zip(group, rows, strict=True)]
    base = next((entry for entry, cell in zip(entries, group, strict=True) if cell.is_baseline), None)
    for entry in entries:
        ours, theirs = entry["output_tokens_per_second"], base["output_tokens_per_second"] if base else None
        entry["output_tokens_per_second_ratio"] = ours / theirs if ours is not None and theirs else None
    baseline = group[0].baseline
    return {
        "baseline": baseline.label if baseline else None,
        "num_requests": max(cell.run.num_requests for cell in group),
        "num_common": len(ids),
        "num_other_lengths": other,
        "cells": entries,
    }


def _rows_of_finished(cell: Cell) -> dict[str, int]:
    """Row by request id, of the requests that finished by themselves."""
    ids = cell.run.requests["request_id"]
    return {str(ids[row]): int(row) for row in np.flatnonzero(cell.run.finished)}


def _cell(cell: Cell, rows: np.ndarray) -> dict[str, Any]:
    """One cell over the requests of `rows`: from the first of their scheduled arrivals to the last of their ends."""
    req = cell.run.requests
    tokens = int(req["num_output_tokens"][rows].sum())
    length = float(req["finish_time"][rows].max() - req["arrival_time"][rows].min()) if len(rows) else 0.0
    latencies = request_latencies(cell.run)
    result = {"label": cell.label} | {key: cell.summary[key] for key in ("num_requests", "num_finished", *LOST)}
    return (
        result
        | {
            "output_tokens": tokens,
            "duration_seconds": length,
            "output_tokens_per_second": tokens / length if length > 0 else None,
            "requests_per_second": len(rows) / length if length > 0 else None,
        }
        | {key: describe(latencies[key][rows]) for key in LATENCIES}
    )


def same_work_sentences(groups: Sequence[dict[str, Any]], best: str | None) -> str:
    """What stands in the headline; empty where all cells did the same work.

    Args:
        groups: what `compare_same_work` found.
        best: label of the cell that the headline is about.
    """
    if not groups:
        return ""
    group = next((one for one in groups if any(cell["label"] == best for cell in one["cells"])), groups[0])
    done = [cell["num_finished"] for cell in group["cells"]]
    if min(done) < max(done) or max(done) > group["num_common"]:
        served = f"{count(min(done))} to {count(max(done))}" if min(done) < max(done) else f"other {count(done[0])}"
        text = f" The cells served different requests ({served} of {count(group['num_requests'])})"
    else:
        text = (
            f" Outputs differ in length ({count(group['num_other_lengths'])} of {count(group['num_common'])} requests)"
        )
    if not group["num_common"]:
        return f"{text}, and none that all of them finished."
    entries = {cell["label"]: cell for cell in group["cells"]}
    one = entries.get(best or "") or max(group["cells"], key=lambda cell: cell["output_tokens_per_second"] or 0.0)
    text += f"; over the {count(group['num_common'])} that all served, {one['label']} has "
    text += f"{rate(one['output_tokens_per_second'])} output tokens/s"
    if one["label"] != group["baseline"] and one["output_tokens_per_second_ratio"] is not None:
        text += f", {ratio(one['output_tokens_per_second_ratio'])} times {group['baseline']}"
    return f"{text}."


def same_work_section(groups: Sequence[dict[str, Any]]) -> Section:
    """The cells over the requests that all of them served."""
    rows = []
    for group in groups:
        for cell in group["cells"]:
            lost = ", ".join(f"{count(cell[key])} {word}" for key, word in LOST.items() if cell[key])
            stats = [cell[key][name] for key in LATENCIES for name in ("p50", "p99")]
            rows.append([cell["label"], f"{count(cell['num_finished'])} of {count(cell['num_requests'])}",
                         lost or "none", count(group["num_common"]), count(cell["output_tokens"]),
                         rate(cell["output_tokens_per_second"]), ratio(cell["output_tokens_per_second_ratio"]),
                         *map(seconds, stats)])  # fmt: skip
    header = ["cell", "finished", "lost", "served by all", "their tokens", "output tok/s", "ratio",
              *(f"{name} {part}" for name in ("TTFT", "TPOT", "E2E") for part in ("p50", "p99"))]  # fmt: skip
    notes = [
        "Throughput: output tokens of the requests that all cells of one baseline finished / the time from the first "
        "of their scheduled arrivals to the last of their ends. The other requests' load was there too."
    ]
    different = sum(group["num_other_lengths"] for group in groups)
    if different:
        notes.append(
            f"Of these requests {count(different)} have outputs of different lengths (a stop token, or a server's own "
            "limit), so that tokens/s are of different tokens too."
        )
    table = Table(header, rows, text_columns=frozenset({2}))
    return Section("Over the requests that all cells served", [], [], [table], notes)
