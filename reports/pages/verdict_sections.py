"""The sections of a comparison that rest on repeats: who differs from the baseline, and the runs one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvarena.reports.analysis.latency import DEFINITIONS
from kvarena.reports.comparing.headline import p_text
from kvarena.reports.comparing.verdicts import LEVEL, THROUGHPUT
from kvarena.reports.drawing.document import Column, Picture, Section, Table, at
from kvarena.reports.drawing.format import DASH, count, interval, percent, rate, ratio, seconds

RULE = (
    "Ratios are taken between runs of the same seed and round, latencies as the median of the requests' ratios. The "
    "ratio shown is their geometric mean; its interval, Student's t over repeats, is at 95 % for this ratio alone. "
    "Rounds of one seed share its requests: with several seeds they are averaged, and each seed counts once. A verdict "
    "is given where p, after Holm over all {num} verdicts of this report, is at most {level}: half of that level is "
    "throughput's and half the latencies'. One run each has no interval."
)


def verdict_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """Every ratio to the baseline with its verdict, and below what the requests' ratios are like."""
    compared = [cell for cell in summary["cells"] if cell["paired"]]
    rows, described = [], []
    for metric in (THROUGHPUT, *compared[0]["paired"]):
        for cell in compared:
            entry = cell["output_tokens_per_second_verdict"] if metric == THROUGHPUT else cell["paired"][metric]
            name = metric_name(metric)
            repeats = f"{count(entry['repeats'])} {entry['unit']}" if entry["repeats"] > 1 else count(entry["repeats"])
            rows.append([name, cell["label"], cell["baseline"], ratio(entry["ratio"]), interval(entry["interval"]),
                         repeats, p_text(entry["p_holm"]) or DASH, entry["verdict"]])  # fmt: skip
            if metric != THROUGHPUT:
                asked = entry["requests"]
                described.append([name, cell["label"], count(asked["count"]),
                                  *(ratio(asked[key]) for key in ("p25", "p50", "p75"))])  # fmt: skip
    header = ["ratio of", "cell", "against", "ratio", "95 % interval", "repeats", "after Holm", "verdict"]
    requests_header = ["requests' ratios", "cell", "requests", "first quartile", "median", "third quartile"]
    picture = Picture(
        "paired",
        svg["paired"],
        "Ratios to the baseline's. Dots: the repeats; line: 95 % interval over repeats, none with one run each; "
        "filled: a difference is shown, hollow: none is.",
        "forest plot of ratios to the baseline",
    )
    rule = summary["verdict_rule"]
    notes = [RULE.format(num=rule["num_verdicts"], level=percent(LEVEL))]
    notes.append("The requests' ratios, all repeats together, describe these runs; no verdict rests on them.")
    tables = [
        Table(header, grouped(rows), text_columns=frozenset({1, 2, 7})),
        Table(requests_header, grouped(described), text_columns=frozenset({1})),
    ]
    return Section("Against the baseline", [], [picture], tables, notes)


def metric_name(metric: str) -> str:
    """A metric in a table or above a panel."""
    return "Output tok/s" if metric == THROUGHPUT else DEFINITIONS[metric][0]


def runs_section(summary: dict[str, Any], pages: Mapping[str, str]) -> Section:
    """The repeats one by one; `pages`: folder -> relative URL of that run's own report."""
    columns: list[Column] = [
        ("run", at(str, "label")),
        ("output tok/s", at(rate, THROUGHPUT)),
        *((f"{name.upper()} p50", at(seconds, f"{name}_seconds", "p50")) for name in ("ttft", "tpot", "e2e")),
        ("finished", done_text),
    ]
    notes = ["Every run behind the rows above; runs.csv has all their numbers."]
    if any(run["contention"] for run in summary["runs"]):
        columns += [
            ("processor", at(percent, "contention", "processor_share")),
            ("stolen", at(percent, "contention", "steal_share")),
            ("probe (work/s)", at(rate, "contention", "probe_speed")),
        ]
        notes.append(
            "Processor: processor time / wall time of the measured part. Stolen: time that a hypervisor gave away. "
            "Probe: speed of a fixed piece of work, geometric mean of before and after the run."
        )
    links = {(row, 0): pages[run["folder"]] for row, run in enumerate(summary["runs"]) if run["folder"] in pages}
    return Section("The runs", tables=[Table.of(summary["runs"], columns, links=links)], notes=notes)


def done_text(entry: Mapping[str, Any]) -> str:
    """How many of its requests a run or a cell finished."""
    return f"{count(entry['num_finished'])} of {count(entry['num_requests'])}"


def grouped(rows: list[list[str]]) -> list[list[str]]:
    """The rows with the first cell blank where it repeats the one above."""
    before = [None, *(row[0] for row in rows)]
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before, strict=False)]
