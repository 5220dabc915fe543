"""The longest context for which a packed batch gives each sequence what it would get alone."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from kvarena.engine.errors import ModelError

LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")


def max_model_len(config: PretrainedConfig, name: str) -> int:
    """Context length of a text config, in tokens.

    Three things bound it beside the stated length:
    - `longrope` picks its frequencies by the longest position in the *batch*: below
      `original_max_position_embeddings` all sequences use the short ones, whoever they share the batch with.
    - `dynamic` NTK scaling does so above `max_position_embeddings`, which stays the limit.
    - chunked attention (Llama 4) is written in the mask alone, which the hook does not get: within one chunk it is
      plain causal attention.

    Two kinds stretch it:
    - `yarn`: the original length times its factor, where that is more than what is stated.
    - `linear`, where every layer has it: its factor times the stated length, or times the original one where the
      config tells both apart. (Gemma 3 has it in some layers, and states the stretched length.)

    Raises:
        ModelError: the config states no context length.
    """
    limit = stated_len(config)
    if limit is None:
        raise ModelError(f"{name} states no context length: config.json has none of {', '.join(LENGTH_FIELDS)}")
    ropes = _rope_parameters(config)
    if ropes and all(rope.get("rope_type") == "linear" for rope in ropes):
        limit = max(limit, min(int((_original(rope, config) or limit) * _factor(rope)) for rope in ropes))
    for rope in ropes:
        kind, original = rope.get("rope_type"), _original(rope, config)
        if kind == "yarn" and original:
            limit = max(limit, int(original * _factor(rope)))
        if kind == "longrope" and original:
            limit = min(limit, int(original))
    chunk = getattr(config, "attention_chunk_size", None)
    return min(limit, chunk) if isinstance(chunk, int) and chunk > 0 else limit


def stated_len(config: PretrainedConfig) -> int | None:
    """Positions that a text config states; None: it states none."""
    stated = [getattr(config, field, None) for field in LENGTH_FIELDS]
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def _original(rope: dict[str, Any], config: PretrainedConfig) -> int | None:
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def _factor(rope: dict[str, Any]) -> float:
    return float(rope.get("factor") or 1.0)


def limited_by(config: PretrainedConfig) -> str:
    """What keeps `max_model_len` below the positions that the config states, for messages; empty for nothing."""
    chunk = getattr(config, "attention_chunk_size", None)
    if isinstance(chunk, int) and chunk > 0:
        return f"its attention is cut in chunks of {chunk} tokens, which the engine's attention is not"
    if any(rope.get("rope_type") == "longrope" for rope in _rope_parameters(config)):
        return "beyond them longrope takes other frequencies, for every request of a step at once"
    return ""


def num_decoder_layers(config: PretrainedConfig, name: str) -> int:
    """Decoder layers of a text config.

    Raises:
        ModelError: it states no number of them.
    """
    found = getattr(config, "num_hidden_layers", None)
    if not isinstance(found, int):
        raise ModelError(
            f"{name} ({config.model_type}) cannot be run: its config has no num_hidden_layers; it is no stack of "
            "equal decoder layers"
        )
    check_layers(config, name)
    return found


def check_layers(config: PretrainedConfig, name: str) -> None:
    """See that a text config which states a number of decoder layers states one. Raises ModelError."""
    found = getattr(config, "num_hidden_layers", None)
    if isinstance(found, int) and found < 1:
        raise ModelError(f"{name}: num_hidden_layers={found} must be at least 1; correct config.json, or copy it again")


def latent_dim(config: PretrainedConfig) -> int | None:
    """Elements that a layer of multi-head latent attention needs of a token; None where the config states none.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1: the compressed keys and values, and the shared rotated key.
    """
    rank, rotated = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    return rank + rotated if isinstance(rank, int) and isinstance(rotated, int) else None


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: one, or one per layer type."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
