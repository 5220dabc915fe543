"""What the manifest says of a run on engines of this process, whether one or several replicas."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
import torch

from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.recording.interruption import Signals, name_of
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.explain import first_line


class Recorded(Protocol):
    """What was recorded of a run."""

    @property
    def num_finished(self) -> int: ...  # noqa: D102

    def step_columns(self) -> dict[str, np.ndarray] | None: ...  # noqa: D102

    def interrupt(self, by: str, num_requests: int) -> dict[str, Any]: ...  # noqa: D102


def interrupted_facts(
    recording: Recorded, num_requests: int, signals: Signals, error: BaseException | None
) -> dict[str, Any] | None:  # fmt: skip
    """How far a run came that did not come to its end; None of one that did, with or without a signal."""
    if error is None and (signals.number is None or recording.num_finished == num_requests):
        return None
    by = name_of(signals.number) if signals.number is not None else f"{type(error).__name__}: {first_line(error)}"
    return recording.interrupt(by, num_requests)


def simulation_facts(parts: EngineParts, recording: Recorded, name: str) -> dict[str, Any] | None:
    """The profile, and what of the run lies outside of what it was fitted to, which is said at once; else None."""
    columns = recording.step_columns()
    if parts.simulation_facts is None or parts.outside is None or columns is None:
        return parts.simulation_facts
    outside = parts.outside(columns)
    for line in outside:
        print(f"warning: {name}: {line}", file=sys.stderr)
    return parts.simulation_facts | {"outside": outside}


def on_gpu(config: RunConfig) -> bool:
    """Whether a GPU computes."""
    return config.engine.device != "cpu" and torch.cuda.is_available()


def engine_facts(parts: EngineParts) -> dict[str, Any]:
    """Section `engine`: what settings that leave it open came to."""
    times = getattr(parts.engine.scheduler, "step_times", None)
    return {"overlap": parts.engine.overlap, "step_times": None if times is None else times.facts}


def eviction_facts(*replicas: EngineParts) -> dict[str, Any]:
    """What section `pool` says of the policy by which cached blocks go, at the end of a run; nothing without one."""
    found = (getattr(parts.engine.allocator, "policy", None) for parts in replicas)
    policies = [policy for policy in found if policy is not None]
    if not policies:
        return {}
    return {
        "eviction": {
            "policy": type(policies[0]).__module__.rpartition(".")[2],
            "num_remembered": sum(policy.num_remembered for policy in policies),
            "bytes": sum(policy.num_bytes for policy in policies),
            "num_kinds": max(len(policy.kinds) for policy in policies) if policies[0].uses_kinds else None,
        }
    }


def model_facts(parts: EngineParts) -> dict[str, Any]:
    """Section `model`."""
    spec = parts.spec
    return {
        "name": spec.name,
        "num_parameters": spec.num_parameters,
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "max_model_len": spec.max_model_len,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "quantization": spec.quantization or None,
        "kv_needed": _kv_needed(parts),
        "experts": None if spec.experts is None else spec.experts._asdict(),
    }


def _kv_needed(parts: EngineParts) -> dict[str, Any] | None:
    """What the longest request takes of the pool and what the model needs of it; None where that is the same."""
    spec, num_tokens = parts.spec, parts.max_model_len
    window = getattr(parts.engine.allocator, "sliding_window", None)
    stored = spec.kv_bytes_per_token * (num_tokens if window is None else min(window, num_tokens))
    needed = spec.needed_kv_bytes(num_tokens)
    if needed >= stored:
        return None
    return {
        "num_tokens": num_tokens,
        "stored_bytes": stored,
        "bytes": needed,
        "why": spec.kv_surplus_reasons(num_tokens),
    }
