"""Do two runs of one workload decide the same, step for step, when each has a clock of its own?

A replay gives the recorded times, and so every step can be decided the same (`kvarena.experiments.simulation.replay`).
Under the simulated clock a request that arrives a little before a step in one run arrives a little after it in the
other. From there on the steps hold other requests: the metrics may agree all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a difference is told by, in this order: the columns, and what they count.
COUNTS = (
    ("num_scheduled", "requests in the step"),
    ("num_new_tokens", "new tokens"),
    ("num_prefill_requests", "requests with prompts"),
    ("num_preempted", "requests preempted"),
    ("num_running", "requests running"),
    ("num_waiting", "requests waiting"),
)

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Divergence:
    """Two runs, step by step from the start.

    Attributes:
        num_steps: of the recorded run.
        num_same: steps of the same index that decide the same.
        first: index of the first step that does not; None where all do.
        what: how the first differs, in words; empty where none does.
    """

    num_steps: int
    num_same: int
    first: int | None
    what: str

    @property
    def share(self) -> float:
        """Of the recorded steps, those that decide the same."""
        return self.num_same / self.num_steps if self.num_steps else 1.0

    def __str__(self) -> str:
        if self.first is None:
            return f"all {self.num_steps:,} steps decide the same"
        return (
            f"{self.num_same:,} of {self.num_steps:,} steps ({self.share:.1%}) decide the same; the first that does "
            f"not is step {self.first:,}: {self.what}"
        )


def compare_decisions(recorded: Columns, simulated: Columns) -> Divergence:
    """Compare the decision hashes of steps of the same index, and say how the first other one differs.

    Args:
        recorded, simulated: columns of steps.parquet.
    """
    ours, theirs = simulated["decision_hash"], recorded["decision_hash"]
    common = min(len(ours), len(theirs))
    same = ours[:common] == theirs[:common]
    if len(ours) == len(theirs) and same.all():
        return Divergence(common, common, None, "")
    first = int(np.argmin(same)) if not same.all() else common
    return Divergence(len(theirs), int(same.sum()), first, _difference(recorded, simulated, first))


def _difference(recorded: Columns, simulated: Columns, index: int) -> str:
    """How step `index` differs, in words."""
    for name, run, other in (("recorded", recorded, simulated), ("simulated", simulated, recorded)):
        if index >= len(run["step"]):
            return f"the {name} run ended before it, and the other had {len(other['step']):,} steps"
    told = [
        f"{recorded[column][index]:,} {what} recorded, {simulated[column][index]:,} simulated"
        for column, what in COUNTS
        if recorded[column][index] != simulated[column][index]
    ]
    return "; ".join(told) or "as many requests and tokens, of other requests or in other slots"
