"""What a profile was fitted to, and what of a run lies outside of it: there its times are extrapolated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.checks import check_int

MARGIN = 1.1  # a tenth beyond what was seen is still called inside

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class FittedRange:
    """The largest steps that a profile was fitted to, and on what.

    Steps that only decode and steps with prompts have a range each: they run other code, and a step with prompts beside
    many long decodes is not known from ones that have prompts alone.

    Args:
        schedulers: that were seen, with their token budgets.
        workloads: names of the length distributions that were seen.
        num_steps: that were fitted.
        decode_requests: most requests of a step that only decodes.
        decode_kv_tokens: most tokens whose KV such a step read.
        prefill_tokens: most new tokens of a step with prompts.
        prefill_requests: most requests of such a step.
        prefill_decodes: most requests that decoded in such a step.
        prefill_kv_tokens: most tokens whose KV such a step read.
        longest_prefill: longest context, in tokens, that a prompt's query attended to.

    Raises:
        ConfigError: a count that is not a whole number of at least 0.
    """

    schedulers: Sequence[str]
    workloads: Sequence[str]
    num_steps: int
    decode_requests: int
    decode_kv_tokens: int
    prefill_tokens: int
    prefill_requests: int
    prefill_decodes: int
    prefill_kv_tokens: int
    longest_prefill: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("schedulers", "workloads"):
                check_int(f"profile.fitted.{field.name}", getattr(self, field.name), 0)

    @classmethod
    def of(cls, columns: Columns, schedulers: Sequence[str], workloads: Sequence[str]) -> FittedRange:
        """The range of recorded steps.

        Args:
            columns: of steps.parquet, of all runs together.
            schedulers, workloads: see the class.
        """
        largest = {name: int(values.max(initial=0)) for name, (_, values) in _measures(columns).items()}
        return cls(schedulers, workloads, len(columns["num_scheduled"]), **largest)

    def outside(self, columns: Columns) -> list[str]:
        """One sentence where steps of a run are larger than what was fitted, by more than a tenth; else nothing.

        Args:
            columns: of the run's steps.parquet.
        """
        beyond = np.zeros(len(columns["num_scheduled"]), dtype=np.bool_)
        worst = []
        for name, (what, values) in _measures(columns).items():
            limit = getattr(self, name)
            over = values > MARGIN * limit
            if over.any():
                beyond |= over
                worst.append(f"up to {int(values.max()):,} {what} where the largest fitted step has {limit:,}")
        if not worst:
            return []
        seconds = columns["end_time"] - columns["start_time"]
        return [
            f"Outside what its profile was fitted to: {beyond.mean():.1%} of the steps, {_share(seconds, beyond):.1%} "
            f"of their time ({'; '.join(worst)}). There times are extrapolated, and nothing is known of their error."
        ]


def _share(seconds: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    total = float(seconds.sum())
    return float(seconds[mask].sum()) / total if total > 0 else 0.0


def _measures(columns: Columns) -> dict[str, tuple[str, NDArray[Any]]]:
    """Per limit: what it counts, in words, and that of every step (0 in steps of the other kind)."""
    prompts = columns["num_prefill_requests"] > 0
    scheduled, kv = columns["num_scheduled"], columns["num_kv_tokens"]
    return {
        "decode_requests": ("requests in steps that only decode", np.where(prompts, 0, scheduled)),
        "decode_kv_tokens": ("tokens of KV read in steps that only decode", np.where(prompts, 0, kv)),
        "prefill_tokens": ("new tokens in steps with prompts", np.where(prompts, columns["num_new_tokens"], 0)),
        "prefill_requests": ("requests in steps with prompts", np.where(prompts, scheduled, 0)),
        "prefill_decodes": (
            "requests that decode in steps with prompts",
            np.where(prompts, scheduled - columns["num_prefill_requests"], 0),
        ),
        "prefill_kv_tokens": ("tokens of KV read in steps with prompts", np.where(prompts, kv, 0)),
        "longest_prefill": ("tokens of context of a prompt", columns["longest_prefill"]),
    }
