"""The words and tables of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kvarena.reports.analysis.latency import DEFINITIONS
from kvarena.reports.analysis.slo import limits_text, met_text
from kvarena.reports.analysis.windows import WINDOWS, kv_use
from kvarena.reports.comparing.cells import STRATEGY, Cell
from kvarena.reports.comparing.costs import cost_section
from kvarena.reports.comparing.repeats import Contender, contenders
from kvarena.reports.comparing.same_work import same_work_section
from kvarena.reports.comparing.tokens import GOOD
from kvarena.reports.comparing.verdicts import HIGHER, LEVEL, THROUGHPUT
from kvarena.reports.drawing.document import Column, Document, Picture, Section, Table, at, commands
from kvarena.reports.drawing.format import DASH, count, percent, rate, ratio, seconds
from kvarena.reports.drawing.paper import FIGURE_2_SOURCE
from kvarena.reports.drawing.style import CLASS_LOOKS
from kvarena.reports.pages.comparison_figures import MAX_PANELS, curve_cells
from kvarena.reports.pages.curves import curve_section
from kvarena.reports.pages.run_sections import LEDGER_MEANING, commit, definitions, facts
from kvarena.reports.pages.verdict_sections import RULE, done_text, grouped, runs_section, verdict_section
from kvarena.reports.reading.names import KV_MAP_FILE

SHARED_FACTS = ("Model", "KV pool", "Workload", "Arrivals", "Machine", "Software", "Commit")


def comparison_document(
    summary: dict[str, Any], runs: list[Cell], svg: dict[str, str], pages: Mapping[str, str] | None = None
) -> Document:
    """The comparison of these runs as a document.

    Args:
        summary: what summary.json holds.
        runs: its cells.
        svg: name -> markup of every figure.
        pages: folder -> relative URL of that run's own report.
    """
    pages = pages or {}
    cells = contenders(runs)
    same = summary["same_tokens"]
    sections = [
        grid_section(summary, svg, pages),
        memory_section(summary, cells, svg),
        latency_section(summary, cells, svg),
    ]
    if "paired" in svg:
        sections.insert(1, verdict_section(summary, svg))
    if summary["curves"]:
        sections.insert(1, curve_section(summary["curves"]["lines"], summary["curves"]["axis"], svg["curves"]))
    if summary["costs"]:
        sections.insert(1, cost_section(summary["costs"]))
    if summary["same_work"]:
        sections.insert(1, same_work_section(summary["same_work"]))
    if len(summary["runs"]) > len(cells):
        sections.append(runs_section(summary, pages))
    if summary["failed"]:
        sections.append(failed_section(summary))
    return Document(
        kicker=f"kvarena · comparison{' of simulated runs' if all(cell.is_simulated for cell in cells) else ''}",
        title=title(summary, cells),
        headline=summary["headline"],
        notices=summary["notices"],
        verdict=(same["line"], same["verdict"] in GOOD),
        facts=shared_facts(cells),
        commands=commands(*summary["commands"]),
        sections=sections,
        definitions=[
            (
                "Verdict",
                RULE.format(num=summary["verdict_rule"]["num_verdicts"], level=percent(LEVEL)),
            ),
            *definitions(),
        ],
        config=json.dumps(cells[0].run.manifest["config"], indent=2, ensure_ascii=False),
        footer=f"Made by kvarena from the files of {len(summary['runs'])} runs; the configuration shown is that of "
        f"{cells[0].label}. Commit {commit(cells[0].summary)}.",
    )


def title(summary: dict[str, Any], cells: list[Contender]) -> str:
    """What varies, over how many cells and runs, and whether they were simulated."""
    keys = varied(summary["settings"], [cell.settings for cell in cells])
    names = [key.rsplit(".", 1)[-1].replace("_", " ") for key in keys]
    num_runs = len(summary["runs"])
    size = (
        f"{num_runs} runs" if num_runs == len(cells) else f"{len(cells)} cell{'s' * (len(cells) > 1)}, {num_runs} runs"
    )
    text = f"{size}: {' × '.join(names)}" if names else f"{size} of one configuration"
    number = sum(cell.is_simulated for cell in cells)
    return text + ("" if not number else ", simulated" if number == len(cells) else f", {number} of them simulated")


def shared_facts(cells: list[Contender]) -> list[tuple[str, str]]:
    """Facts that all cells share; one that differs says so."""
    tables = [dict(facts(cell.summary)) for cell in cells]
    result = []
    shown = [*SHARED_FACTS, *(["Simulated"] if any("Simulated" in table for table in tables) else [])]
    for name in shown:
        values = {table.get(name, "measured") for table in tables}
        result.append((name, values.pop() if len(values) == 1 else "differs between the runs"))
    return result


def grid_section(summary: dict[str, Any], svg: dict[str, str], pages: Mapping[str, str]) -> Section:
    """One row per cell: its settings and the numbers that decide."""
    cells = summary["cells"]
    settings = varied(summary["settings"], [cell["settings"] for cell in cells]) or summary["settings"]
    names = [key if key in STRATEGY else key.rsplit(".", 1)[-1] for key in settings]
    columns: list[Column] = [
        *((name, partial(_setting, key)) for name, key in zip(names, settings, strict=True)),
        ("output tok/s", at(rate, THROUGHPUT)),
        *([("range", _range), ("runs", at(count, "num_repeats"))]
          if any(cell["num_repeats"] > 1 for cell in cells) else []),
        ("ratio", at(ratio, "output_tokens_per_second_ratio")),
        ("TTFT p50", at(seconds, "ttft_seconds", "p50")),
        ("TTFT p99", at(seconds, "ttft_seconds", "p99")),
        ("TPOT p50", at(seconds, "tpot_seconds", "p50")),
        ("E2E p50", at(seconds, "e2e_seconds", "p50")),
        ("batch", at(rate, "batch_size_mean")),
        ("KV: token states", lambda cell: percent(kv_use(cell))),
        *([("KV: + cached", lambda cell: percent(kv_use(cell, "cached")))]
          if any(kv_use(cell, "cached") for cell in cells) else []),
        *([("hit rate", at(percent, "cached_prompt_share"))]
          if any(cell["cached_prompt_share"] for cell in cells) else []),
        *([("of the most", at(percent, "cache_share_of_optimum"))]
          if any(cell.get("cache_share_of_optimum") for cell in cells) else []),
        *([("imbalance", at(ratio, "imbalance"))] if any(cell["imbalance"] for cell in cells) else []),
        ("preempted", at(count, "num_preemptions")),
        *([("good requests", at(percent, "slo", "whole_run", "attainment")),
           ("goodput req/s", at(rate, "slo", "whole_run", "good_requests_per_second")),
           ("objective", at(met_text, "slo", "whole_run", "met"))] if any(cell["slo"] for cell in cells) else []),
        ("finished", done_text),
    ]  # fmt: skip
    lead = summary["fastest"] or {"verdict": None}
    best = [row for row, cell in enumerate(cells) if lead["verdict"] == HIGHER and lead["cell"] == cell["label"]]
    table = Table.of(
        cells, columns, names[1:],
        strong=frozenset((row, len(settings)) for row in best),
        links={(row, 0): pages[cell["folder"]] for row, cell in enumerate(cells) if cell["folder"] in pages},
    )  # fmt: skip
    picture = Picture(
        "overview",
        svg["overview"],
        "Output throughput, mean batch over step time, and time to first token of every cell: means over its runs; "
        "dots: the runs. Bold in the table: shown to be the fastest.",
        "bars of throughput and batch size, and TTFT ranges, one row per cell",
    )
    notes = [
        f"Ratio: output throughput / the baseline's ({summary['baseline']}). KV: mean share of the pool over all "
        "steps, in token states and beside them in cached prefixes; the section KV memory has the windows in which "
        "requests wait, with how much of each run they cover."
    ]
    if table.links:
        repeated = any(cell["num_repeats"] > 1 for cell in cells)
        notes.append(f"A row's first word leads to the report of its run{', the first of several' * repeated}.")
    goals = {(limits_text(cell["slo"]["limits"]), cell["slo"]["goal"]) for cell in cells if cell["slo"]}
    notes += [
        f"Good requests: share of all requests with {limits}; goodput: these / duration. The objective: {goal}."
        for limits, goal in sorted(goals)
    ]
    notes += [f"{cell.get('name', DASH)} is not defined: {cell.get('error', DASH)}." for cell in summary["not_defined"]]
    notes += pairing_notes(summary)
    return Section("The grid", [], [picture], [table], notes)


def varied(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all."""
    return [key for key in keys if len({repr(own.get(key)) for own in settings}) > 1]


def _range(cell: dict[str, Any]) -> str:
    """The smallest and the largest throughput of its repeats."""
    seen = cell["spread"][THROUGHPUT]
    return f"{rate(seen['min'])} – {rate(seen['max'])}"


def _setting(key: str, cell: dict[str, Any]) -> str:
    value = cell["settings"].get(key)
    return DASH if value is None else str(value)


def pairing_notes(summary: dict[str, Any]) -> list[str]:
    """Which cells are not paired and why, and which pairs are one run."""
    notes = [f"{cell['label']} is not paired: {cell['unpaired']}." for cell in summary["cells"] if cell["unpaired"]]
    return notes + [
        f"{one} and {other} are one run: beside itself it differs in nothing." for one, other in summary["same_runs"]
    ]


def memory_section(summary: dict[str, Any], cells: list[Contender], svg: dict[str, str]) -> Section:
    """KV memory of every cell."""
    rows = []
    for window in WINDOWS:
        for cell in summary["cells"]:
            split = cell[f"kv_share_mean{window.suffix}"]
            if split is not None:
                keys = ("waste_beyond_token_states", "held_share_mean", "step_time_share")
                rows.append([window.label, cell["label"], *(percent(split[name]) for name in LEDGER_MEANING),
                             *(percent(cell[f"{key}{window.suffix}"]) for key in keys)])  # fmt: skip
    header = ["window", "cell", *(_short(name) for name in LEDGER_MEANING), "waste", "held", "of step time"]
    pictures = [
        Picture("kv_split", svg["kv_split"],
                f"Mean split of KV memory over all steps, weighted by step time. "
                f"Below: {FIGURE_2_SOURCE}; its “external & others” holds what is "
                "neither token state, reservation nor internal fragmentation, and the split of vLLM's last 3.7 % is "
                "not given (outlined).",
                "bars of the mean share of each ledger class per cell, with the paper's four bars"),
        Picture("kv_memory", svg["kv_memory"],
                "KV memory over time on one time axis: a picture that ends earlier is a run that was done earlier."
                + (" Of each cell its first run." if any(len(cell.runs) > 1 for cell in cells) else "")
                + ("" if len(cells) <= MAX_PANELS else f" The first {MAX_PANELS} cells."),
                "stacked areas of KV slots by ledger class over time, one panel per cell"),
    ]  # fmt: skip
    if "kv_maps" in svg:
        pictures.append(Picture("kv_maps", svg["kv_maps"], maps_caption(cells), "maps of the KV pool, one per cell"))
    notes = [
        "Shares of the pool. Waste: what is neither token state nor cached prefix. Held: owned by finished requests "
        "of a static batch; part of the classes before it. Of step time: how much of it the window covers."
    ]
    return Section("KV memory", [], pictures, [Table(header, grouped(rows), text_columns=frozenset({1}))], notes)


def maps_caption(cells: list[Contender]) -> str:
    """What the maps show, and of which cells there are none."""
    text = (
        "Who owns the pool, on one scale of time and slots for all cells (addresses of virtual regions have a scale of "
        "their own): time across, slots down, a colour a request, pale where its blocks are still empty. Requests that "
        "never meet may share a colour."
    )
    if any(len(cell.runs) > 1 for cell in cells):
        text += " Of each cell its first run."
    missing = [cell.label for cell in cells[:MAX_PANELS] if not (cell.run.path / KV_MAP_FILE).exists()]
    text += f" Recorded none: {', '.join(missing)}." if missing else ""
    return text + (f" The first {MAX_PANELS} cells." if len(cells) > MAX_PANELS else "")


def _short(name: str) -> str:
    return CLASS_LOOKS[name].label.replace(" fragmentation", "").replace(" prefixes", "")


def latency_section(summary: dict[str, Any], cells: list[Contender], svg: dict[str, str]) -> Section:
    """Latency percentiles of every cell."""
    rows = []
    for key in ("ttft_seconds", "tpot_seconds", "itl_seconds", "e2e_seconds", "queue_time_seconds"):
        for cell in summary["cells"]:
            stats = cell[key]
            values = [seconds(stats[name]) for name in ("mean", "p50", "p90", "p95", "p99", "max")]
            rows.append([DEFINITIONS[key][0], cell["label"], count(stats["count"]), *values])
    header = ["latency", "cell", "n", "mean", "p50", "p90", "p95", "p99", "max"]
    drawn = curve_cells(cells)
    caption = "Cumulative distributions over requests (ITL: over gaps)."
    if len(drawn) < len(cells):
        caption += f" {len(drawn)} of {len(cells)} cells: those under the fastest one's conditions."
    alt = "cumulative distributions of TTFT, TPOT, ITL and E2E per cell"
    picture = Picture("latency", svg["latency"], caption, alt)
    folded = "n and max are over all runs of a cell; mean and percentiles are each run's own, averaged over the runs."
    return Section(
        "Latency", [], [picture], [Table(header, grouped(rows), text_columns=frozenset({1}))],
        [folded] if any(len(cell.runs) > 1 for cell in cells) else [],
    )  # fmt: skip


def failed_section(summary: dict[str, Any]) -> Section:
    """Cells that did not finish, and why."""
    columns = [("cell", lambda cell: str(cell.get("name", DASH))), ("error", lambda cell: str(cell.get("error", DASH)))]
    return Section("Failed cells", tables=[Table.of(summary["failed"], columns, ["error"])])
