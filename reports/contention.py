"""What else the machine did beside a run (`contention` in its manifest), as a comparison shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import Cell
from reports.judge import probe_speed


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
