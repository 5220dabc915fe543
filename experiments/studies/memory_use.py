"""How a run's KV pool was used over one window of steps: what the memory studies read from a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvarena.engine.classes import CLASSES, OWNED
from kvarena.engine.errors import EngineError
from kvarena.experiments.studies.claims import Mean
from kvarena.reports.analysis.memory import mean_shares, step_spans, weighted_mean
from kvarena.reports.analysis.windows import WAITING, window_masks
from kvarena.reports.reading.files import RunFiles, read_run

OTHERS = "others"  # what no request owns while one waits: the paper's “external fragmentation & others”
UNWANTED = "unwanted"  # what no request owns while none waits
SEGMENTS = (*OWNED, OTHERS, UNWANTED)

WindowOf = Callable[[RunFiles], np.ndarray]  # bool per step
SCARCE = "more requests or a smaller pool (workload.num_requests, kv_cache.num_slots) make memory scarce"


class MemoryUse(NamedTuple):
    """A run's pool over one window of steps; means are over step time.

    Attributes:
        shares: ledger class -> share of the pool in percent; they add up to 100.
        segments: the same by SEGMENTS.
        batch: requests in a step.
        largest_batch: most requests in a step of the whole run.
        time_share: the window's part of the run's step time, in percent.
        waiting_share: the part of the window in which a request waits, in percent.
    """

    shares: dict[str, float]
    segments: dict[str, float]
    batch: float
    largest_batch: int
    time_share: float
    waiting_share: float


def memory_use(run_dir: Path, window: WindowOf, least_time: float = 0.0) -> MemoryUse:
    """Read a run folder.

    Args:
        run_dir: the folder.
        window: which of its steps count.
        least_time: part of the run's step time that the window must cover, percent: what is seen in one step of a
            hundred says little of a run.

    Raises:
        ReportError: a file is missing or broken.
        EngineError: the window holds no step, or too little of the run.
    """
    run = read_run(run_dir)
    mask = window(run)
    spans = step_spans(run.steps)
    shares = mean_shares(run.steps, spans, mask)
    if shares is None:
        raise EngineError(f"{run_dir.name}: no step lies in the window that is looked at; {SCARCE}")
    weight = spans.weight[mask]
    time_share = float(100 * weight.sum() / spans.weight.sum())
    if time_share < least_time:
        raise EngineError(
            f"{run_dir.name}: the window that is looked at covers {time_share:.1f} % of the run's step time, less than "
            f"{least_time:g} %; {SCARCE}"
        )
    wanted = run.steps["num_waiting"][mask] > 0

    def mean(values: np.ndarray) -> float:
        return float(weighted_mean(values, weight) or 0.0)

    unowned = (
        np.sum([run.steps[name] for name in CLASSES if name not in OWNED], axis=0)[mask] / run.steps["total"][mask]
    )
    segments = {name: 100 * shares[name] for name in OWNED}
    segments |= {OTHERS: 100 * mean(unowned * wanted), UNWANTED: 100 * mean(unowned * ~wanted)}
    return MemoryUse(
        shares={name: 100 * shares[name] for name in CLASSES},
        segments=segments,
        batch=mean(run.steps["num_scheduled"][mask].astype(float)),
        largest_batch=int(run.steps["num_scheduled"].max()),
        time_share=time_share,
        waiting_share=100 * mean(wanted.astype(float)),
    )


def waiting(run: RunFiles) -> np.ndarray:
    """Bool per step: a request is in the queue, so that empty memory costs something."""
    return window_masks(run)[WAITING.suffix]


def over_seeds(uses: Sequence[MemoryUse], value: Callable[[MemoryUse], float]) -> Mean:
    """A number of each seed's run as a mean with its interval."""
    return Mean.of([value(use) for use in uses])


def share_over_seeds(uses: Sequence[MemoryUse], value: Callable[[MemoryUse], float]) -> Mean:
    """The same of a share in percent, whose interval ends at 0 and 100."""
    return over_seeds(uses, value).clipped(0.0, 100.0)


def covered(uses: Sequence[MemoryUse]) -> str:
    """How much of their runs the window covers, least to most of the seeds."""
    shares = [use.time_share for use in uses]
    return f"{min(shares):.0f} to {max(shares):.0f} % of the run's step time"


def class_shares(uses: Iterable[Sequence[MemoryUse]]) -> Callable[[str], list[float]]:
    """What `split_chart` asks for: of a class, the mean share over seeds of each of `uses`."""
    return lambda key: [float(np.mean([use.shares[key] for use in of])) for of in uses]
