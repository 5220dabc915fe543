"""What a reader must know before believing a headline, one sentence each, in order of weight.

`summary["notices"]` of a run and of a comparison holds them; pages and the terminal show them right below the headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import Cell
from reports.differences import hidden_differences
from reports.format import seconds


def run_notices(summary: dict[str, Any]) -> list[str]:
    """The notices of one run.

    Args:
        summary: of the run, all but its headline and notices.
    """
    return [] if summary["valid"] else [_invalid(summary)]


def _invalid(summary: dict[str, Any]) -> str:
    """Why the run's latencies must not be trusted."""
    return (
        f"Invalid run: the driver handed a request over {seconds(summary['lateness_seconds']['max'])} after its "
        f"scheduled arrival, more than driver.max_lateness={summary['lateness_bound_seconds']:g} s allows."
    )


def comparison_notices(cells: Sequence[Cell], summary: dict[str, Any]) -> list[str]:
    """The notices of a comparison.

    Args:
        cells: its cells, labelled.
        summary: of the comparison, all but its headline and notices.
    """
    notices = []
    invalid = [cell["label"] for cell in summary["cells"] if not cell["valid"]]
    if invalid:
        notices.append(f"Invalid, because the driver fell behind its bound: {', '.join(invalid)}.")
    if summary["measured_together"]:
        notices.append(
            "Measured at the same time on one machine, so that each slowed the others down: "
            f"{', '.join(summary['measured_together'])}."
        )
    if summary["two_clocks"]:
        notices.append(
            "Simulated beside measured, so that a ratio is also the simulator's distance from the machine: "
            f"{', '.join(summary['two_clocks'])}."
        )
    if summary["decode_kernels"]:
        ran = "; ".join(f"{kernel}: {', '.join(labels)}" for kernel, labels in summary["decode_kernels"].items())
        notices.append(
            f"Decode attention ran in different kernels ({ran}), so part of a difference may be theirs; "
            "runner.attention=triton gives all cells the same one."
        )
    return notices + hidden_differences(cells)
