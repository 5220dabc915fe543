"""How a run's KV pool was used, with intervals: what the memory studies read from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import EngineError
from reports.files import CLASSES, RunFiles, read_run
from reports.memory import mean_shares, step_spans, weighted_mean
from reports.windows import ROOM, Window, window_masks

NUM_BATCHES = 10
T_975 = 2.262  # Student's t with NUM_BATCHES - 1 degrees of freedom, two-sided 95 %


class Mean(NamedTuple):
    """A time-weighted mean over steps and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class MemoryUse(NamedTuple):
    """A run's pool over one window of steps.

    Attributes:
        shares: ledger class -> mean share of the pool in percent; they add up to 100.
        token_states: the share of token states, with its interval.
        batch: mean number of requests in a step, with its interval.
        largest_batch: most requests in a step of the whole run.
        num_steps: in the window.
        time_share: the window's part of the run's step time, in [0, 1].
    """

    shares: dict[str, float]
    token_states: Mean
    batch: Mean
    largest_batch: int
    num_steps: int
    time_share: float


def batch_means(values: np.ndarray, weight: np.ndarray) -> Mean:
    """Mean of a correlated series with its interval by the method of batch means (Law and Kelton, section 9.5.3).

    Args:
        values: one per step, in order; at least NUM_BATCHES.
        weight: seconds per step.
    """
    edges = np.searchsorted(np.cumsum(weight), np.linspace(0, weight.sum(), NUM_BATCHES + 1)[1:-1])
    parts = zip(np.split(values, edges), np.split(weight, edges), strict=True)
    means = np.array([mean for part, of in parts if (mean := weighted_mean(part, of)) is not None])
    value = weighted_mean(values, weight)
    if value is None or len(means) < 2:
        raise EngineError(f"{len(values)} steps are too few for a mean with an interval; run more requests")
    half = T_975 * float(means.std(ddof=1)) / len(means) ** 0.5
    return Mean(value, value - half, value + half)


def memory_use(run_dir: Path, window: Window = ROOM) -> MemoryUse:
    """Read a run folder.

    Raises:
        ReportError: a file is missing or broken.
        EngineError: the window holds too few steps.
    """
    run = read_run(run_dir)
    mask = window_masks(run)[window.suffix]
    if mask.sum() < NUM_BATCHES:
        raise EngineError(
            f"{run_dir.name}: only {int(mask.sum())} steps ran {window.phrase}; more requests or a smaller pool "
            "(workload.num_requests, kv_cache.num_slots) make memory scarce"
        )
    spans = step_spans(run.steps)
    shares = mean_shares(run.steps, spans, mask)
    assert shares is not None  # the window is not empty
    weight = spans.weight[mask]
    return MemoryUse(
        shares={name: 100 * shares[name] for name in CLASSES},
        token_states=batch_means(100 * _share(run, "token_states")[mask], weight),
        batch=batch_means(run.steps["num_scheduled"][mask].astype(float), weight),
        largest_batch=int(run.steps["num_scheduled"].max()),
        num_steps=int(mask.sum()),
        time_share=float(weight.sum() / spans.weight.sum()),
    )


def _share(run: RunFiles, name: str) -> np.ndarray:
    return run.steps[name] / run.steps["total"]
