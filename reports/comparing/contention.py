"""What else the machine did beside a run (`contention` in its manifest): in numbers, and in words where it matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.judge import probe_speed
from kvarena.reports.drawing.format import percent

LEAST_SHARE = 0.8  # of a processor, while the engine was busy: below, others had the rest
MOST_STOLEN = 0.02
MOST_CHANGE = 0.2  # of the probe, from before the run to after it; on quiet machines up to 16 % were seen
MOST_NAMED = 2  # runs, one by one
SPREADS = 4  # of the probe's own slices: a change within so many is the probe's


def run_contention(cell: Cell) -> dict[str, Any] | None:
    """Of a run: processor time over wall time, stolen time, and the probe's speed; None where nothing was measured."""
    contention = cell.run.manifest.get("contention")
    if not contention:
        return None
    names = ("processor_share", "steal_share")
    return {name: contention.get(name) for name in names} | {"probe_speed": probe_speed(cell)}


def contention_notices(cells: Sequence[Cell]) -> list[str]:
    """Says that no probe ran, where measured runs are compared and some have no probe."""
    measured = [cell for cell in cells if not cell.is_simulated]
    without = [cell for cell in measured if probe_speed(cell) is None]
    if len(measured) < 2 or not without:
        return []
    which = "these runs" if len(without) == len(measured) else f"{len(without)} of {len(measured)} runs"
    return [f"No probe of the machine ran beside {which}: that it was as fast for all is not known."]


def run_had_company(summary: dict[str, Any]) -> list[str]:
    """One sentence on a run that others slowed down; none where nothing shows it.

    Args:
        summary: of the run.
    """
    found = _signs(summary)
    if not found:
        return []
    return [f"This run did not have its machine to itself: {_words(found)}. Its times hold that too."]


def cells_had_company(cells: Sequence[Cell]) -> list[str]:
    """The same of a comparison's runs: each with what shows it, or with many of them how many and the worst."""
    found = [(cell, signs) for cell in cells if (signs := _signs(cell.summary))]
    if not found:
        return []
    if len(found) <= MOST_NAMED:
        named = "; ".join(f"{cell.run_label}: {_words(signs)}" for cell, signs in found)
        return [f"Not alone on the machine, and the times hold that too: {named}."]
    kinds = []
    for kind in dict.fromkeys(sign.kind for _, signs in found for sign in signs):
        those = [sign for _, signs in found for sign in signs if sign.kind == kind]
        worst = max(those, key=lambda sign: sign.weight)
        kinds.append(f"{kind} in {len(those)} (the worst: {worst.text})")
    return [
        f"Not alone on the machine in {len(found)} of {len(cells)} runs, and their times hold that too: "
        f"{'; '.join(kinds)}. runs.csv has each."
    ]


class _Sign(NamedTuple):
    kind: str
    text: str
    weight: float  # larger is worse, within the kind


def _words(signs: Sequence[_Sign]) -> str:
    return "; ".join(sign.text for sign in signs)


def _signs(summary: dict[str, Any]) -> list[_Sign]:
    contention = summary.get("contention")
    if not contention:
        return []
    signs = []
    share, busy = contention.get("processor_share"), summary["busy_share"]
    computes_here = not summary.get("target") and not (summary["machine"] or {}).get("gpu")
    if computes_here and share is not None and busy and share < LEAST_SHARE * busy:
        had = f"the process had {percent(share)} of a processor"
        text = f"{had} while its engine was busy {percent(busy)} of the time"
        signs.append(_Sign("too little of a processor", text, -share / busy))
    if (stolen := contention.get("steal_share") or 0.0) > MOST_STOLEN:
        text = f"the hypervisor took {percent(stolen)} of all processors' time"
        signs.append(_Sign("stolen time", text, stolen))
    probe = contention.get("probe")
    if probe and probe["before"] > 0 and probe["after"] > 0:
        change, bound = probe["after"] / probe["before"], max(MOST_CHANGE, SPREADS * (probe.get("spread") or 0.0))
        if abs(change - 1) > bound:
            text = (
                f"a fixed piece of work ran at {percent(change)} of the speed that it had before the run (up to "
                f"{percent(bound)} more or less is noise)"
            )
            signs.append(_Sign("another speed after the run than before it", text, abs(math.log(change))))
    return signs
