"""A study's claims as tables: published numbers, checks, and numbers that nobody stated, each apart.

Only published numbers that something was held against are judged ("N of M hold"). One that nothing could be held
against is not comparable: it neither holds nor fails, and is counted by itself. The same goes for checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table as TerminalTable

from kvarena.reports.drawing.document import Column, Section, Table, at
from kvarena.reports.drawing.format import DASH, interval

PUBLISHED = ("value", "range", "up to", "bound")
CHECK, FITTED = "check", "fitted"
HOLDS, PASSES, FAILS = "holds", "passes", "fails"
NOT_DECIDED, NOT_COMPARABLE = "not decided", "not comparable"
DIFFERING = ("differs", "less than stated", "more than stated")
JUDGED = (HOLDS, *DIFFERING, NOT_DECIDED)

Claim = Mapping[str, Any]


def kind_of(claim: Claim) -> str:
    """The claim's kind; of a study.json that is older than kinds, what its verdict says."""
    kind = claim.get("kind")
    if kind is not None:
        return str(kind)
    return "value" if claim["verdict"] in (*JUDGED, NOT_COMPARABLE) else "ours"


def tally(claims: Sequence[Claim]) -> dict[str, int]:
    """How many claims there are of each sort, and what they came to; each claim is counted once below its sort.

    Published numbers: judged = holding + differing + not decided, and apart from these the not comparable ones. Checks:
    those that were made = passing + failing, and apart from these the undecided and the not comparable ones. The rest
    was measured, or fitted to.
    """
    published = [claim["verdict"] for claim in claims if kind_of(claim) in PUBLISHED]
    checks = [claim["verdict"] for claim in claims if kind_of(claim) == CHECK]
    return {
        "num_claims": len(claims),
        "num_judged": sum(map(published.count, JUDGED)),
        "num_holding": published.count(HOLDS),
        "num_differing": sum(map(published.count, DIFFERING)),
        "num_not_decided": published.count(NOT_DECIDED),
        "num_not_comparable": published.count(NOT_COMPARABLE),
        "num_checks": checks.count(PASSES) + checks.count(FAILS),
        "num_passing": checks.count(PASSES),
        "num_failing": checks.count(FAILS),
        "num_checks_not_decided": checks.count(NOT_DECIDED),
        "num_checks_not_comparable": checks.count(NOT_COMPARABLE),
        "num_not_judged": len(claims) - len(published) - len(checks),
    }


def verdict_line(claims: Sequence[Claim]) -> tuple[str, bool] | None:
    """What the claims came to in one line, and whether all is well; None where nothing is judged."""
    counts = tally(claims)
    parts = []
    if counts["num_judged"]:
        parts.append(f"{counts['num_holding']} of {counts['num_judged']} published numbers hold{apart(counts)}")
    elif counts["num_not_comparable"]:
        parts.append(f"no published number is judged{apart(counts)}")
    if counts["num_checks"]:
        parts.append(f"{counts['num_passing']} of {counts['num_checks']} checks pass{apart(counts, 'checks_')}")
    elif undecided := apart(counts, "checks_"):
        parts.append(f"no check is decided{undecided}")
    if not parts:
        return None
    good = not (counts["num_differing"] or counts["num_not_decided"] or counts["num_failing"])
    line = "; ".join(parts) + "."
    return line[0].upper() + line[1:], good


def apart(counts: Mapping[str, int], of: str = "") -> str:
    """What of the published numbers (or of the `checks_`) neither holds nor fails: ", 1 not decided, 2 not ..."."""
    kinds = ((counts[f"num_{of}not_decided"], NOT_DECIDED), (counts[f"num_{of}not_comparable"], NOT_COMPARABLE))
    return "".join(f", {number} {kind}" for number, kind in kinds if number)


def claims_sections(claims: Sequence[Claim], beside: str) -> list[Section]:
    """One section a sort of claim; of a sort without claims none.

    Args:
        claims: as study.json holds them, with `ratio`.
        beside: name of the second column of ours; "" for none.
    """
    published = [claim for claim in claims if kind_of(claim) in PUBLISHED]
    others = [claim for claim in claims if kind_of(claim) not in (*PUBLISHED, CHECK)]
    checks = [claim for claim in claims if kind_of(claim) == CHECK]
    sections = []
    if published:
        sections.append(Section("Published numbers, and ours", tables=[claims_table(published, beside)]))
    if others:
        title = "Not judged: measured, or fitted" if published or checks else "What we found"
        sections.append(Section(title, tables=[claims_table(others, beside)]))
    if checks:
        text = "What must come out so (theorems, limits of our own): no published number, and counted apart."
        sections.append(Section("Checks", text=[text], tables=[claims_table(checks, beside)]))
    return sections


def claims_table(claims: Sequence[Claim], beside: str = "") -> Table:
    """Stated, ours, ratio, verdict; one row a claim."""
    second = bool(beside) and any(claim.get("beside") is not None for claim in claims)
    columns = [
        *COLUMNS[:4],
        *([(beside, lambda claim: interval_text(claim, "beside"))] if second else []),
        *COLUMNS[4:],
        ("holds when", at(str, "tolerance")), ("verdict", at(str, "verdict")), ("remark", at(str, "note")),
    ]  # fmt: skip
    return Table.of(claims, columns, ("kind", "holds when", "verdict", "remark"))


def study_table(summary: Mapping[str, Any]) -> TerminalTable:
    """The claims for the terminal; published numbers first, checks last."""
    line = verdict_line(summary["claims"])
    caption = "\n".join([summary["headline"], *summary["notices"], *([line[0]] if line else [])])
    table = TerminalTable(title=escape(summary["title"]), caption=escape(caption), box=None)
    table.add_column(COLUMNS[0][0], overflow="fold")
    for name, _ in COLUMNS[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    order = {name: place for place, name in enumerate((*PUBLISHED, "ours", FITTED, CHECK))}
    for claim in sorted(summary["claims"], key=lambda one: order.get(kind_of(one), 0) >= len(PUBLISHED)):
        good = claim["verdict"] in (HOLDS, PASSES, "measured")
        verdict = claim["verdict"] if good else f"[yellow]{claim['verdict']}[/yellow]"
        table.add_row(*(escape(show(claim)) for _, show in COLUMNS), verdict)
    return table


def ratio_of(claim: Claim) -> float | None:
    """Ours over stated; None where either is missing, nothing is stated but 0, or no number holds it."""
    ratio = claim["ours"] / claim["stated"] if claim["stated"] and claim["ours"] is not None else None
    return ratio if ratio is None or math.isfinite(ratio) else None


def stated_text(claim: Claim) -> str:
    """The source's value or range."""
    least, most = claim.get("stated_least"), claim.get("stated_most")
    if least is not None and most is not None:
        return f"{_digits(least)} to {_digits(most)} {claim['unit']}".strip()
    return _value(claim["stated"], claim["unit"])


def interval_text(claim: Claim, key: str = "ours") -> str:
    """A value with its interval."""
    low, high = ("low", "high") if key == "ours" else (f"{key}_low", f"{key}_high")
    text = _value(claim.get(key), claim["unit"])
    if claim.get(low) is None or claim.get(high) is None:
        return text
    return f"{text} {interval((claim[low], claim[high]), _digits)}"


def ratio_text(claim: Claim) -> str:
    """Ours over stated; of a range over its nearer end."""
    return DASH if claim["ratio"] is None else f"{claim['ratio']:.2f}"


# Of a claim, on the page and in the terminal.
COLUMNS: tuple[Column, ...] = (
    ("claim", at(str, "quantity")), ("kind", kind_of), ("stated", stated_text), ("ours", interval_text),
    ("ours / stated", ratio_text),
)  # fmt: skip


def _value(value: float | None, unit: str) -> str:
    return DASH if value is None else f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    """Four digits; whole numbers from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
