"""Cuts what a config states of windows, key selections and scales short, so that a probe of few tokens crosses it.

A fault behind a window of 4,096 tokens would else need a prompt of 4,097. Names are those that transformers' configs
and layers use; what they hold is put back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

# Window; keys that are kept; positions of one temperature step.
SHORT = {"window": 3, "kept": 2, "step": 2}
_KINDS = (
    (re.compile(r"^(?!use_|max_|n_|num_|kvarena_)(.*_)?window(_size)?$"), "window"),
    (re.compile(r"^index_topk$"), "kept"),
    (re.compile(r"^(floor_scale|log_scaling_n_floor)$"), "step"),
)


@contextmanager
def short_spans(module: nn.Module) -> Iterator[list[str]]:
    """Within the block the module's windows and scales are short.

    Yields:
        The names of what was cut, sorted; empty when nothing states any.
    """
    held: list[tuple[Any, str, Any, int]] = []
    ropes: list[tuple[dict[str, Any], int]] = []
    for owner in _owners(module):
        for name, value in list(vars(owner).items()):
            short = next((SHORT[kind] for pattern, kind in _KINDS if pattern.match(name)), None)
            if short is not None and isinstance(value, (int, float)) and type(value) is not bool and value > short:
                held.append((owner, name, value, short))
        rope = getattr(owner, "rope_parameters", None) if isinstance(owner, PretrainedConfig) else None
        if isinstance(rope, dict) and rope.get("llama_4_scaling_beta"):
            original = rope.get("original_max_position_embeddings")
            if isinstance(original, int) and all(rope is not known for known, _ in ropes):
                ropes.append((rope, original))
    try:
        for owner, name, value, short in held:
            setattr(owner, name, type(value)(short))
        for rope, _ in ropes:
            rope["original_max_position_embeddings"] = SHORT["step"]
        yield sorted({name for _, name, _, _ in held} | ({"llama_4_scaling_beta"} if ropes else set()))
    finally:
        for owner, name, value, _ in held:
            setattr(owner, name, value)
        for rope, original in ropes:
            rope["original_max_position_embeddings"] = original


def _owners(module: nn.Module) -> list[Any]:
    """The modules and the configs that they hold, each once."""
    found: dict[int, Any] = {}
    for part in module.modules():
        found[id(part)] = part
        config = part.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
            text = config.get_text_config()
            found[id(text)] = text
    return list(found.values())
