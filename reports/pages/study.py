"""The report of a study: stated values beside ours, what differs, and the study's figures; from study.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarena.reports.comparing.cells import page_of
from kvarena.reports.comparing.differences import machine_name
from kvarena.reports.drawing.document import Document, Picture, Section, commands, write_pages
from kvarena.reports.drawing.format import DASH
from kvarena.reports.drawing.study_charts import draw_charts
from kvarena.reports.pages.study_claims import claims_sections, kind_of, ratio_of, tally, verdict_line
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import STUDY_FILE
from kvarena.reports.reading.shapes import STUDY
from kvarena.reports.reading.writing import write_csv, write_json

MANY_CELLS = 30
NOT_KNOWN = "not known (docs/simulator.md, Fidelity)"
CLAIM_COLUMNS = (
    "quantity", "kind", "unit", "stated", "stated_least", "stated_most", "ours", "low", "high", "beside", "beside_low",
    "beside_high", "ratio", "tolerance", "verdict", "note",
)  # fmt: skip


def write_study_report(study_dir: Path) -> dict[str, Any]:
    """Write report.html, report.md, claims.csv, figures and summary.json beside study.json.

    Returns:
        What summary.json holds: the claims with kinds and ratios, and how many of them hold.

    Raises:
        ReportError: study.json is missing or broken, or the folder cannot be written.
    """
    study = read_study(study_dir)
    claims = [claim | {"kind": kind_of(claim), "ratio": ratio_of(claim)} for claim in study["claims"]]
    conditions, (title, headline) = study.get("conditions") or {}, _heads(study)
    summary = {
        "title": title,
        "experiment": study.get("experiment"),
        "headline": headline,
        "notices": _notices(study),
        **tally(claims),
        "claims": claims,
        **{key: conditions.get(key) for key in ("simulated", "profiles", "seeds")},
        "cells": study["cells"],
        "git": study["git"],
        "versions": study.get("versions"),
        "command": study["command"],
    }
    document = study_document(study, claims, draw_charts(study["charts"], study_dir), _pages(study, study_dir))
    write_pages(study_dir, document)
    write_json(study_dir / "summary.json", summary)
    write_csv(study_dir / "claims.csv", claims, CLAIM_COLUMNS)
    return summary


def read_study(study_dir: Path) -> dict[str, Any]:
    """study.json. Raises ReportError."""
    study: dict[str, Any] = read_json(study_dir / STUDY_FILE, STUDY, "run the experiment again")
    return study


def study_document(
    study: dict[str, Any], claims: list[dict[str, Any]], svg: dict[str, str], pages: Sequence[tuple[str, str]] = ()
) -> Document:
    """The report as a document.

    Args:
        study: study.json.
        claims: its claims, with `ratio`.
        svg: name -> inline SVG of every chart.
        pages: name and relative URL of each cell's own report.
    """
    pictures = [Picture(c["name"], svg[c["name"]], c["caption"], c["caption"]) for c in study["charts"]]
    sections = claims_sections(claims, study.get("beside") or "")
    if pictures:
        sections = [*sections[:1], Section("Figures", pictures=pictures), *sections[1:]]
    if study["differences"]:
        sections.append(Section("What differs from the source", items=list(study["differences"])))
    if study["notes"]:
        sections.append(Section("How it was measured", text=list(study["notes"])))
    if pages:
        sections.append(Section("The cells", text=["Each cell has a report of its own."], links=list(pages)))
    title, headline = _heads(study)
    return Document(
        kicker="kvarena · report of an experiment",
        title=title,
        headline=headline,
        notices=_notices(study),
        verdict=verdict_line(claims),
        facts=_facts(study),
        commands=commands(study["command"]),
        sections=sections,
        footer=f"Made on {study['created']} from study.json.",
    )


def _heads(study: dict[str, Any]) -> tuple[str, str]:
    """Title and headline, which say where its cells were simulated."""
    if (study.get("conditions") or {}).get("simulated"):
        return f"{study['title']} (simulated)", f"Simulated: {study['headline']}"
    return study["title"], study["headline"]


def _notices(study: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the headline: under which step times it was simulated."""
    profiles = (study.get("conditions") or {}).get("profiles") or []
    if not profiles:
        return []
    names = ", ".join(profile["name"] for profile in profiles)
    errors: dict[str, list[str]] = {}
    for profile in profiles:
        errors.setdefault(profile.get("error") or NOT_KNOWN, []).append(profile["name"])
    told = "; ".join(f"{', '.join(of)}: {error}" for error, of in errors.items())
    return [f"No device computed these cells; step times are by profile ({names}). What is known of its error: {told}."]


def _facts(study: dict[str, Any]) -> list[tuple[str, str]]:
    """What ran, and under which conditions; what an older study.json does not hold is not listed."""
    conditions, git = study.get("conditions") or {}, study["git"]
    simulated = bool(conditions.get("simulated"))
    facts = [("source", study["source"])]
    if "seeds" in conditions:
        facts.append(("seeds of the workload", ", ".join(map(str, conditions["seeds"])) or DASH))
    sources: dict[str, list[str]] = {}
    for profile in conditions.get("profiles") or []:
        sources.setdefault(profile.get("source") or DASH, []).append(profile["name"])
    facts += [("simulated under the profile", f"{', '.join(of)}: {source}") for source, of in sources.items()]
    facts.append(("simulator ran on" if simulated else "machine", machine_name(study["machine"])))
    if study.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in study["versions"].items())))
    facts.append(("commit", f"{git.get('commit') or DASH}{' with local changes' if git.get('dirty') else ''}"))
    facts.append(("cells", _cells(study["cells"])))
    return facts


def _pages(study: dict[str, Any], study_dir: Path) -> list[tuple[str, str]]:
    """Name and relative URL of each cell that has a page."""
    found = [(name, page_of(study_dir / name, study_dir)) for name in study["cells"]]
    return [(name.removeprefix("cells/"), page) for name, page in found if page is not None]


def _cells(names: list[str]) -> str:
    """The cells' folders by name; of very many the number (study.json has the names)."""
    return ", ".join(names) or DASH if len(names) <= MANY_CELLS else f"{len(names)}, listed in study.json"
