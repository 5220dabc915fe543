"""Says where a measured run did not have its machine to itself: what that does to a run looks like the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import Cell
from reports.format import percent

LEAST_SHARE = 0.8  # of a processor, while the engine was busy: below, others had the rest
MOST_STOLEN = 0.02
MOST_CHANGE = 0.1  # of the probe, from before the run to after it


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
    if probe and probe["before"] > 0 and abs(probe["after"] / probe["before"] - 1) > MOST_CHANGE:
        change = percent(probe["after"] / probe["before"])
        signs.append(f"a fixed piece of work ran at {change} of the speed that it had before the run")
    return signs
