"""The report of a study: stated values beside ours, what differs, and the study's figures; from study.json alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as TerminalTable

from reports.document import Document, Picture, Section, Table, render_html, render_markdown, write_text
from reports.files import read_json
from reports.format import DASH
from reports.shapes import STUDY
from reports.study_charts import draw_charts

MANY_CELLS = 30
CLAIM_COLUMNS = ("quantity", "unit", "stated", "ours", "low", "high", "ratio", "tolerance", "verdict", "note")


def write_study_report(study_dir: Path) -> dict[str, Any]:
    """Write report.html, report.md, claims.csv, figures and summary.json beside study.json.

    Returns:
        What summary.json holds: the claims with ratios, and how many of them hold.

    Raises:
        ReportError: study.json is missing or broken, or the folder cannot be written.
    """
    study = read_study(study_dir)
    claims = [claim | {"ratio": _ratio(claim)} for claim in study["claims"]]
    summary = {
        "title": study["title"],
        "experiment": study.get("experiment"),
        "headline": study["headline"],
        "num_claims": len(claims),
        "num_holding": sum(claim["verdict"] == "holds" for claim in claims),
        "claims": claims,
        "cells": study["cells"],
        "git": study["git"],
    }
    document = study_document(study, claims, draw_charts(study["charts"], study_dir))
    write_text(study_dir / "report.html", render_html(document))
    write_text(study_dir / "report.md", render_markdown(document))
    write_text(study_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    rows = io.StringIO()
    writer = csv.DictWriter(rows, CLAIM_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(claims)
    write_text(study_dir / "claims.csv", rows.getvalue())
    return summary


def read_study(study_dir: Path) -> dict[str, Any]:
    """study.json. Raises ReportError."""
    study: dict[str, Any] = read_json(study_dir / "study.json", STUDY, "run the experiment again")
    return study


def study_document(study: dict[str, Any], claims: list[dict[str, Any]], svg: dict[str, str]) -> Document:
    """The report as a document.

    Args:
        study: study.json.
        claims: its claims, with `ratio`.
        svg: name -> inline SVG of every chart.
    """
    holding = sum(claim["verdict"] == "holds" for claim in claims)
    judged = sum(claim["verdict"] in ("holds", "differs") for claim in claims)
    pictures = [Picture(c["name"], svg[c["name"]], c["caption"], c["caption"]) for c in study["charts"]]
    sections = [Section("What was claimed, and what we found", tables=[claims_table(claims)], pictures=pictures)]
    if study["differences"]:
        sections.append(Section("What differs from the source", text=[f"- {line}" for line in study["differences"]]))
    if study["notes"]:
        sections.append(Section("How it was measured", text=list(study["notes"])))
    git = study["git"]
    return Document(
        kicker="kvarena · report of an experiment",
        title=study["title"],
        headline=study["headline"],
        verdict=(f"{holding} of {judged} claims hold.", holding == judged) if judged else None,
        facts=[
            ("source", study["source"]),
            ("command", " ".join(study["command"])),
            ("machine", _machine(study["machine"])),
            ("commit", f"{git.get('commit') or DASH}{' with local changes' if git.get('dirty') else ''}"),
            ("cells", _cells(study["cells"])),
        ],
        sections=sections,
        footer=f"Made on {study['created']} from study.json.",
    )


def claims_table(claims: list[dict[str, Any]]) -> Table:
    """Stated, ours, ratio, verdict; one row a claim."""
    header = ["claim", "stated", "ours", "ratio", "holds when", "verdict", "remark"]
    rows = [
        [
            claim["quantity"],
            _value(claim["stated"], claim["unit"]),
            _interval(claim),
            DASH if claim["ratio"] is None else f"{claim['ratio']:.2f}",
            claim["tolerance"],
            claim["verdict"],
            claim["note"],
        ]
        for claim in claims
    ]
    return Table(header, rows, text_columns=frozenset({4, 5, 6}))


def study_table(summary: dict[str, Any]) -> TerminalTable:
    """The claims for the terminal."""
    table = TerminalTable(title=escape(summary["title"]), caption=escape(summary["headline"]), box=None)
    table.add_column("claim", overflow="fold")
    for name in ("stated", "ours", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for claim in summary["claims"]:
        table.add_row(
            escape(claim["quantity"]),
            _value(claim["stated"], claim["unit"]),
            escape(_interval(claim)),
            DASH if claim["ratio"] is None else f"{claim['ratio']:.2f}",
            claim["verdict"] if claim["verdict"] == "holds" else f"[yellow]{claim['verdict']}[/yellow]",
        )
    return table


def _ratio(claim: dict[str, Any]) -> float | None:
    return claim["ours"] / claim["stated"] if claim["stated"] and claim["ours"] is not None else None


def _value(value: float | None, unit: str) -> str:
    return DASH if value is None else f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    """Four digits; whole numbers from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"


def _interval(claim: dict[str, Any]) -> str:
    text = _value(claim["ours"], claim["unit"])
    return (
        text if None in (claim["low"], claim["high"]) else f"{text} [{_digits(claim['low'])}, {_digits(claim['high'])}]"
    )


def _cells(names: list[str]) -> str:
    """The cells' folders by name; of very many the number (study.json has the names)."""
    return ", ".join(names) or DASH if len(names) <= MANY_CELLS else f"{len(names)}, listed in study.json"


def _machine(machine: dict[str, Any]) -> str:
    gpu = machine.get("gpu")
    return f"{gpu['count']} x {gpu['name']}" if gpu else f"{machine.get('cores')} cores of {machine.get('cpu')}"
