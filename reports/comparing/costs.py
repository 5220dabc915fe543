"""Two causes kept apart: what capacity costs (allocators on one kernel), and what the kernel costs (kernels under one
allocator). Shown when the runs differ in how kernels address KV (`runner.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvarena.reports.analysis.latency import DEFINITIONS
from kvarena.reports.comparing.judge import Judgement, throughput_ratio
from kvarena.reports.comparing.repeats import Contender
from kvarena.reports.comparing.verdicts import DECIDED, ONE_RUN, ONE_SEED, THROUGHPUT
from kvarena.reports.drawing.document import Column, Section, Table, at
from kvarena.reports.drawing.format import count, interval, ratio

FAR_LOW, FAR_HIGH = 0.01, 100  # ends of an interval, as ratios, beyond which the digits say nothing

LAYOUT = "runner.layout"
LATENCIES = ("tpot_seconds", "e2e_seconds")
METRICS = (THROUGHPUT, *LATENCIES)
NAMES = {THROUGHPUT: "output tok/s"} | {metric: DEFINITIONS[metric][0] for metric in LATENCIES}
Factor = tuple[str, Callable[[str], bool]]
# What varies, as in "what ... costs", the cells of a group, and the settings that vary in it.
FACTORS: dict[str, Factor] = {
    "capacity": ("allocators on the same kernel", lambda key: key.split(".")[0] == "allocator"),
    "the kernel": ("kernels under the same allocator", lambda key: key == LAYOUT),
}


class CostPair(NamedTuple):
    """Two contenders that differ in one factor alone.

    Attributes:
        factor: a key of FACTORS.
        one, other: the pair; `other` has the baseline's side of the factor.
        cell, against: their sides, in words.
        same: what both have.
    """

    factor: str
    one: Contender
    other: Contender
    cell: str
    against: str
    same: str


def cost_pairs(contenders: Sequence[Contender]) -> list[CostPair]:
    """Every pair that differs in the allocator alone, or in the kernel alone; empty unless kernels differ.

    A contender is compared with the one that has the (first) baseline's allocator or kernel, else its group's first.
    """
    if len({one.settings.get(LAYOUT) for one in contenders} - {None}) < 2:
        return []
    base = next((one for one in contenders if one.is_baseline), contenders[0])
    pairs = []
    for factor, (_, belongs) in FACTORS.items():
        groups: dict[str, list[Contender]] = {}
        for one in contenders:
            if one.settings.get(LAYOUT) is not None:
                groups.setdefault(_name(one, belongs, invert=True), []).append(one)
        wanted = _name(base, belongs)
        for same, group in groups.items():
            reference = next((one for one in group if _name(one, belongs) == wanted), group[0])
            against = _name(reference, belongs)
            pairs += [
                CostPair(factor, one, reference, _name(one, belongs), against, same)
                for one in group
                if one is not reference
            ]
    return pairs


def _name(one: Contender, belongs: Callable[[str], bool], *, invert: bool = False) -> str:
    """The settings that belong, or all others, in words."""
    named = {"allocator": "{}", "scheduler": "{}", LAYOUT: "{} kernel"}
    parts = [
        named.get(key, f"{key.rsplit('.', 1)[-1]}={{}}").format(value)
        for key, value in one.settings.items()
        if belongs(key) is not invert and value is not None
    ]
    return ", ".join(parts)


def costs(pairs: Sequence[CostPair], judgement: Judgement) -> list[dict[str, Any]]:
    """`costs` of summary.json: each pair's ratios with their verdicts."""
    return [
        {
            "factor": pair.factor,
            "cell": pair.cell,
            "against": pair.against,
            "same": pair.same,
            "num_repeats": len(pair.one.pairs(pair.other)),
            "output_tokens_per_second_ratio": throughput_ratio(pair.one, pair.other),
            "verdicts": {metric: judgement.of(pair.one, pair.other, metric).as_dict() for metric in METRICS},
        }
        for pair in pairs
    ]


def cost_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line per comparison, for the terminal."""
    return [
        f"What {entry['factor']} costs: {entry['cell']} against {entry['against']} ({entry['same']}): "
        + ", ".join(f"{NAMES[metric]} {brief(entry['verdicts'][metric])}" for metric in METRICS)
        + _single(entry["verdicts"])
        for entry in entries
    ]


def _single(verdicts: dict[str, dict[str, Any]]) -> str:
    """That ratios without repeats decide nothing, in the words of the verdict."""
    words = [verdict["verdict"] for verdict in verdicts.values() if verdict["verdict"] in (ONE_RUN, ONE_SEED)]
    return f" ({words[0]})" if words else ""


def brief(verdict: dict[str, Any]) -> str:
    """A verdict in a line: 1.34 [1.30, 1.38] higher; ≈ where no difference is shown."""
    text = [ratio(verdict["ratio"])]
    if verdict["interval"]:
        text.append(interval(verdict["interval"], end_text))
        text.append(verdict["verdict"] if verdict["verdict"] in DECIDED else "≈" if _is_open(verdict) else "?")
    return " ".join(text)


def _is_open(verdict: dict[str, Any]) -> bool:
    return not verdict["verdict"].startswith("not decided")


def end_text(end: float) -> str:
    """The end of an interval; one that is far off is only said to be."""
    return f"<{FAR_LOW}" if end < FAR_LOW else f">{FAR_HIGH}" if end > FAR_HIGH else ratio(end)


def cost_section(entries: Sequence[dict[str, Any]]) -> Section:
    """Both causes as one table."""
    columns: list[Column] = [
        ("", lambda entry: f"What {entry['factor']} costs: {FACTORS[entry['factor']][0]}"),
        ("of", at(str, "cell")), ("against", at(str, "against")), ("the same in both", at(str, "same")),
    ]  # fmt: skip
    for metric in METRICS:
        columns += [
            (NAMES[metric], at(ratio, "verdicts", metric, "ratio")),
            ("95 % interval", at(partial(interval, text=end_text), "verdicts", metric, "interval")),
            ("verdict", at(str, "verdicts", metric, "verdict")),
        ]
    columns.append(("repeats", at(count, "num_repeats")))
    words = ("of", "against", "the same in both", "95 % interval", "verdict")
    notes = ["Ratios and verdicts as in “Against the baseline”; with one run each there is no interval."]
    return Section("Capacity and kernel", tables=[Table.of(entries, columns, words)], notes=notes)
