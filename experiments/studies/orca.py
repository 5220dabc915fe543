"""The four systems of PagedAttention's evaluation as cells: Orca's three reservations and paged allocation.

Slots, model, card and lengths are the paper's: 15.7 K slots beside OPT-13B on one A100 with 40 GB (Table 1), ShareGPT's
and Alpaca's lengths (Figure 11), Poisson arrivals, at most 2,048 tokens. Step times are the simulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvarena.experiments.studies.cells import CellRunner
from kvarena.reports.analysis.memory import step_spans, weighted_mean
from kvarena.reports.reading.files import RunFiles, read_run

SYSTEMS = {"Orca (Max)": "orca_max", "Orca (Pow2)": "orca_pow2", "Orca (Oracle)": "orca_oracle", "vLLM": "paged"}
FASTER_TRANSFORMER = "FasterTransformer"
FITTED_PROFILE = "a100-40gb-vllm-2023"  # conf/profile; experiment=paper_profile fits it
DIFFERENCES = (
    "Step times are simulated: an A100's public figures, with host times fitted to two of the paper's own bars "
    "(experiment=paper_profile, docs/simulator.md). Memory, allocator and scheduler decisions are real.",
    "Lengths are drawn from distributions with the paper's means; ShareGPT's and Alpaca's texts are not used.",
    "Orca is not public. As in the paper it is a buddy allocator under the same scheduler; the scheduler is ours.",
)
STEADY = "from a quarter to the whole of the arrivals' time, so without ramp and drain"


def beside_name(ideal: str | None, seeds: Sequence[int] = ()) -> str:
    """What the second column of a report's claims is: the same cells under another profile.

    Args:
        ideal: the profile; None or empty: there is no such column.
        seeds: of the workload, where they are fewer than those of the first column.
    """
    if not ideal:
        return ""
    which = f", seed {', '.join(map(str, seeds))}" if seeds else ""
    return f"ideal card ({ideal}{which})"


def seeds_text(seeds: Sequence[int]) -> str:
    """How intervals are made."""
    return f"Means over seeds {', '.join(map(str, seeds))} of the workload; intervals: 95 %, Student's t over seeds."


class Load(NamedTuple):
    """A workload at a rate.

    Attributes:
        workload: a config of group `workload`.
        rate: requests per second.
        num_requests: how many arrive.
    """

    workload: str
    rate: float
    num_requests: int

    @property
    def overrides(self) -> list[str]:
        """As on run.py's command line."""
        return [
            f"workload={self.workload}",
            f"workload.num_requests={self.num_requests}",
            "arrival=poisson",
            f"arrival.rate={self.rate}",
        ]

    @property
    def label(self) -> str:
        """For a folder's name."""
        return f"{self.workload}-{self.rate:g}"


def run_system(
    cells: CellRunner, system: str, load: Load, *overrides: str, seed: int = 0, label: str = ""
) -> dict[str, Any]:
    """Run one system under one load; returns the cell's summary. Its folder is `cells.folders[-1]`.

    Args:
        overrides: further ones.
        seed: of the workload.
        label: in the folder's name, where `overrides` tell cells apart.
    """
    static = system == FASTER_TRANSFORMER
    allocator = "orca_max" if static else SYSTEMS[system]
    scheduler = "static" if static else "continuous"
    parts = (load.label, allocator, "static" if static else "", label, f"seed{seed}")
    options = [f"allocator={allocator}", f"scheduler={scheduler}", *load.overrides, f"workload.seed={seed}"]
    return cells.run("-".join(filter(None, parts)), [*options, *overrides])


def steady(run: RunFiles) -> np.ndarray:
    """Bool per step: between a quarter and the whole of the arrivals' time, so without ramp and drain."""
    last = float(run.requests["arrival_time"].max())
    start: np.ndarray = run.steps["start_time"]
    return (start >= last / 4) & (start <= last)


def mean_batch(cells: CellRunner) -> float:
    """Mean number of requests in a step of the last cell, by step time, over the steady part of its run."""
    run = read_run(cells.folders[-1])
    window = steady(run)
    mean = weighted_mean(run.steps["num_scheduled"][window].astype(float), step_spans(run.steps).weight[window])
    assert mean is not None  # the last request's own steps are in it
    return mean
