"""What else the machine did beside a run (`contention` in its manifest): in numbers, and in words where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import Cell
from reports.format import percent
from reports.judge import probe_speed

LEAST_SHARE = 0.8  # of a processor, while the engine was busy: below, others had the rest
MOST_STOLEN = 0.02
MOST_CHANGE = 0.2  # of the probe, from before the run to after it; on quiet machines up to 16 % were seen
SPREADS = 4  # of the probe's own slices: a change within so many is the probe's


def run_contention(cell: Cell) -> dict[str, Any] | None:
    """Of a run: processor time over wall time, stolen time, and the probe's speed; None where nothing was measured."""
    contention = cell.run.manifest.get("contention")
    if not contention:
        return None
    names = ("processor_share", "steal_share")
    return {name: contention.get(name) for name in names} | {"probe_speed": probe_speed(cell)}


def contention_notices(cells: Sequence[Cell]) -> list[str]:
    """Says that contention was not measured, where measured runs are compared and some have no probe."""
    measured = [cell for cell in cells if not cell.is_simulated]
    without = [cell for cell in measured if probe_speed(cell) is None]
    if len(measured) < 2 or not without:
        return []
    which = "these runs" if len(without) == len(measured) else f"{len(without)} of {len(measured)} runs"
    return [f"Contention was not measured beside {which}: that the machine was as fast for all is not known."]


def run_had_company(summary: dict[str, Any]) -> list[str]:
    """One sentence on a run that others slowed down; none where nothing shows it.

    Args:
        summary: of the run.
    """
    found = _signs(summary)
    if not found:
        return []
    return [f"This run did not have its machine to itself: {'; '.join(found)}. Its times hold that too."]


def cells_had_company(cells: Sequence[Cell]) -> list[str]:
    """The same of a comparison: the cells, each with what shows it."""
    found = [f"{cell.label}: {'; '.join(signs)}" for cell in cells if (signs := _signs(cell.summary))]
    if not found:
        return []
    return [f"Not alone on the machine, and the times hold that too: {'. '.join(found)}."]


def _signs(summary: dict[str, Any]) -> list[str]:
    contention = summary.get("contention")
    if not contention:
        return []
    signs = []
    share, busy = contention.get("processor_share"), summary["busy_share"]
    computes_here = not summary.get("target") and not (summary["machine"] or {}).get("gpu")
    if computes_here and share is not None and busy and share < LEAST_SHARE * busy:
        had = f"the process had {percent(share)} of a processor"
        signs.append(f"{had} while its engine was busy {percent(busy)} of the time")
    if (stolen := contention.get("steal_share") or 0.0) > MOST_STOLEN:
        signs.append(f"the hypervisor took {percent(stolen)} of all processors' time")
    probe = contention.get("probe")
    if probe and probe["before"] > 0:
        bound = max(MOST_CHANGE, SPREADS * (probe.get("spread") or 0.0))
        if abs(probe["after"] / probe["before"] - 1) > bound:
            change = percent(probe["after"] / probe["before"])
            signs.append(
                f"a fixed piece of work ran at {change} of the speed that it had before the run (up to "
                f"{percent(bound)} more or less is noise)"
            )
    return signs
