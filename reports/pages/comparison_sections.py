"""The words and tables of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvarena.reports.analysis.latency import DEFINITIONS
from kvarena.reports.analysis.slo import limits_text
from kvarena.reports.analysis.windows import WINDOWS, kv_use
from kvarena.reports.comparing.cells import STRATEGY, Cell
from kvarena.reports.comparing.costs import cost_section
from kvarena.reports.comparing.repeats import Contender, contenders
from kvarena.reports.comparing.same_work import same_work_section
from kvarena.reports.comparing.tokens import GOOD
from kvarena.reports.comparing.verdicts import HIGHER, LEVEL
from kvarena.reports.drawing.document import Document, Picture, Section, Table, commands
from kvarena.reports.drawing.format import DASH, count, percent, rate, ratio, seconds
from kvarena.reports.drawing.paper import FIGURE_2_SOURCE
from kvarena.reports.drawing.style import CLASS_LOOKS
from kvarena.reports.pages.comparison_figures import MAX_PANELS, curve_cells
from kvarena.reports.pages.curves import curve_section
from kvarena.reports.pages.run_sections import LEDGER_MEANING, commit, definitions, facts
from kvarena.reports.pages.verdict_sections import RULE, grouped, runs_section, verdict_section
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
    varied = [key for key in summary["settings"] if len({repr(cell.settings.get(key)) for cell in cells}) > 1]
    names = [key.rsplit(".", 1)[-1].replace("_", " ") for key in varied]
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
    every = summary["settings"]
    varied = [key for key in every if len({repr(cell["settings"].get(key)) for cell in cells}) > 1]
    settings = varied or every
    columns: list[tuple[str, list[Any], Any]] = [
        ("output tok/s", [cell["output_tokens_per_second"] for cell in cells], rate),
        *_repeat_columns(cells),
        ("ratio", [cell["output_tokens_per_second_ratio"] for cell in cells], ratio),
        ("TTFT p50", [cell["ttft_seconds"]["p50"] for cell in cells], seconds),
        ("TTFT p99", [cell["ttft_seconds"]["p99"] for cell in cells], seconds),
        ("TPOT p50", [cell["tpot_seconds"]["p50"] for cell in cells], seconds),
        ("E2E p50", [cell["e2e_seconds"]["p50"] for cell in cells], seconds),
        ("batch", [cell["batch_size_mean"] for cell in cells], rate),
        ("KV: token states", [kv_use(cell) for cell in cells], percent),
        *([("KV: + cached", [kv_use(cell, "cached") for cell in cells], percent)]
          if any(kv_use(cell, "cached") for cell in cells) else []),
        ("preempted", [cell["num_preemptions"] for cell in cells], count),
    ]  # fmt: skip
    if any(cell["slo"] for cell in cells):
        columns += [
            ("good requests", [_slo(cell, "attainment") for cell in cells], percent),
            ("goodput req/s", [_slo(cell, "good_requests_per_second") for cell in cells], rate),
            ("objective", [_slo(cell, "met") for cell in cells], _met),
        ]
    rows, strong = [], set()
    fastest = summary["fastest"] or {}
    for index, cell in enumerate(cells):
        names = [_text(cell["settings"].get(key)) for key in settings]
        done = f"{count(cell['num_finished'])} of {count(cell['num_requests'])}"
        rows.append([*names, *(show(values[index]) for _, values, show in columns), done])
        if fastest.get("cell") == cell["label"] and fastest["verdict"] == HIGHER:
            strong.add((index, len(settings)))
    header = [key if key in STRATEGY else key.rsplit(".", 1)[-1] for key in settings]
    table = Table(
        [*header, *(name for name, *_ in columns), "finished"],
        rows,
        strong=frozenset(strong),
        links={(row, 0): pages[cell["folder"]] for row, cell in enumerate(cells) if cell["folder"] in pages},
        text_columns=frozenset(range(1, len(settings))),
    )
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


def _met(value: float | None) -> str:
    return DASH if value is None else "met" if value else "missed"


def _repeat_columns(cells: list[dict[str, Any]]) -> list[tuple[str, list[Any], Any]]:
    """How often each cell ran, and its smallest and largest throughput; nothing where none was repeated."""
    if all(cell["num_repeats"] == 1 for cell in cells):
        return []
    ranges = [cell["spread"]["output_tokens_per_second"] for cell in cells]
    return [
        ("range", [f"{rate(seen['min'])} – {rate(seen['max'])}" for seen in ranges], str),
        ("runs", [cell["num_repeats"] for cell in cells], count),
    ]


def _slo(cell: dict[str, Any], key: str) -> float | None:
    return cell["slo"]["whole_run"][key] if cell["slo"] else None


def _text(value: Any) -> str:
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
    rows = [[str(cell.get("name", DASH)), str(cell.get("error", DASH))] for cell in summary["failed"]]
    return Section("Failed cells", [], [], [Table(["cell", "error"], rows, text_columns=frozenset({1}))])
