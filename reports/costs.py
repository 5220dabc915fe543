"""Two causes kept apart: what capacity costs (allocators on one kernel), and what the kernel costs (kernels under one
allocator). Shown when the runs differ in how kernels address KV (`runner.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reports.cells import Cell, is_seed
from reports.document import Section, Table
from reports.format import DASH, count, ratio
from reports.latency import DEFINITIONS
from reports.paired import paired_ratio
from reports.repeats import paired_latencies, ratio_over_repeats, request_ratios

LAYOUT = "runner.layout"
METRICS = ("tpot_seconds", "e2e_seconds")
Factor = tuple[str, Callable[[str], bool]]
# What varies, as in "what ... costs", the cells of a group, and the settings that vary in it.
FACTORS: dict[str, Factor] = {
    "capacity": ("allocators on the same kernel", lambda key: key.split(".")[0] == "allocator"),
    "the kernel": ("kernels under the same allocator", lambda key: key == LAYOUT),
}


def costs(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every pair of cells that differ in the allocator alone, or in the kernel alone; empty unless kernels differ.

    A cell is compared with the one that has the (first) baseline's allocator or kernel, else with its group's first.
    Cells that differ in a seed as well are repeats of the pair.
    """
    if len({cell.settings.get(LAYOUT) for cell in cells} - {None}) < 2:
        return []
    base = next((cell for cell in cells if cell.is_baseline), cells[0])
    return [entry for factor, (_, belongs) in FACTORS.items() for entry in _entries(cells, base, factor, belongs)]


def _entries(cells: Sequence[Cell], base: Cell, factor: str, belongs: Callable[[str], bool]) -> list[dict[str, Any]]:
    pairs: dict[tuple[str, str, str], list[tuple[Cell, Cell]]] = {}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.settings.get(LAYOUT) is not None:
            groups.setdefault(_name(cell, lambda key: not belongs(key)), []).append(cell)
    for group in groups.values():
        wanted = _name(base, belongs)
        reference = next((cell for cell in group if _name(cell, belongs) == wanted), group[0])
        same = _name(reference, lambda key: not belongs(key) and not is_seed(key))
        for cell in group:
            if cell is not reference:
                pairs.setdefault((_name(cell, belongs), _name(reference, belongs), same), []).append((cell, reference))
    return [
        {
            "factor": factor,
            "cell": name,
            "against": against,
            "same": same,
            "num_repeats": len(repeats),
            "output_tokens_per_second_ratio": _throughput_ratio(repeats),
            "paired": {metric: _paired(repeats, metric) for metric in METRICS},
        }
        for (name, against, same), repeats in pairs.items()
    ]


def _name(cell: Cell, belongs: Callable[[str], bool]) -> str:
    """The settings that belong, in words."""
    named = {"allocator": "{}", "scheduler": "{}", LAYOUT: "{} kernel"}
    parts = [
        named.get(key, f"{key.rsplit('.', 1)[-1]}={{}}").format(value)
        for key, value in cell.settings.items()
        if belongs(key) and value is not None
    ]
    return ", ".join(parts)


def _throughput_ratio(repeats: list[tuple[Cell, Cell]]) -> float | None:
    """Of the means over repeats."""
    ours, theirs = (
        [cell.summary["output_tokens_per_second"] for cell in column] for column in zip(*repeats, strict=True)
    )
    return None if None in ours or None in theirs or not sum(theirs) else sum(ours) / sum(theirs)


def _paired(repeats: list[tuple[Cell, Cell]], metric: str) -> dict[str, Any]:
    if len(repeats) == 1:
        [(cell, other)] = repeats
        return paired_ratio(*paired_latencies(cell, other, metric))
    return ratio_over_repeats([ratios for cell, other in repeats if len(ratios := request_ratios(cell, other, metric))])


def cost_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line per comparison, for the terminal."""
    return [
        f"What {entry['factor']} costs: {entry['cell']} against {entry['against']} ({entry['same']}): output tok/s "
        + ", ".join(
            [ratio(entry["output_tokens_per_second_ratio"])]
            + [f"{DEFINITIONS[metric][0]} {' '.join(_interval(entry['paired'][metric]))}" for metric in METRICS]
        )
        for entry in entries
    ]


def _interval(paired: dict[str, Any]) -> tuple[str, str]:
    low, high = paired["ci95_low"], paired["ci95_high"]
    return ratio(paired["median_ratio"]), DASH if low is None else f"[{ratio(low)}, {ratio(high)}]"


def cost_section(entries: Sequence[dict[str, Any]]) -> Section:
    """Both causes as one table."""
    header = ["", "of", "against", "the same in both", "output tok/s"]
    for metric in METRICS:
        header += [DEFINITIONS[metric][0], "95 % interval"]
    rows = [
        [
            f"What {entry['factor']} costs: {FACTORS[entry['factor']][0]}",
            *(entry[key] for key in ("cell", "against", "same")),
            ratio(entry["output_tokens_per_second_ratio"]),
            *(text for metric in METRICS for text in _interval(entry["paired"][metric])),
            count(entry["num_repeats"]),
        ]
        for entry in entries
    ]
    notes = [
        "Ratios; the latencies' are medians over requests that finished in both runs, with intervals from the sign "
        "test. With repeats over seeds they are the means of the repeats' medians with Student's intervals, which hold "
        "run-to-run noise too."
    ]
    table = Table([*header, "repeats"], rows, text_columns=frozenset({1, 2, 3, 6, 8}))
    return Section("Capacity and kernel", [], [], [table], notes)
