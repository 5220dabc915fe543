"""An original config of InternVL becomes the native one, which is all that anybody behind it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import InternVLConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvarena.engine.errors import ModelError

INTERNLM2 = "InternLM2ForCausalLM"
# Of any language model; its class states the rest. What says how to sample, or how to attend, is not taken along.
_COMMON = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_theta",
           "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "quantization_config")  # fmt: skip
# The tower's fields, by the original's names.
_VISION = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "num_channels": "num_channels", "patch_size": "patch_size",
    "image_size": "image_size", "hidden_act": "hidden_act", "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps", "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm",
    "initializer_range": "initializer_range",
}  # fmt: skip
# What InternVisionConfig takes for a field that is left out; the rest has the native class's values.
_VISION_DEFAULTS = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
    "image_size": 224, "use_qk_norm": True, "norm_type": "rms_norm",
}  # fmt: skip


def converted(values: Mapping[str, Any]) -> InternVLConfig:
    """An original config.json as transformers' own class.

    Raises:
        ModelError: its language model is not one that is converted.
    """
    vision = dict(values.get("vision_config") or {})
    tower = _VISION_DEFAULTS | {ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision}
    made = InternVLConfig(
        text_config=_language_model(dict(values.get("llm_config") or {})),
        vision_config=tower,
        downsample_ratio=values.get("downsample_ratio", 0.5),
        vision_feature_layer=values.get("select_layer", -1),
        dtype=values.get("torch_dtype") or values.get("dtype"),
    )
    made.tie_word_embeddings = made.get_text_config().tie_word_embeddings
    # Of no field of the class; version 1 leaves an image transposed.
    made.transposed_features = values.get("ps_version", "v1") == "v1"
    return made


def _language_model(values: dict[str, Any]) -> dict[str, Any]:
    """`llm_config` as the config of a class that transformers has: InternLM2 is a llama whose weights are packed."""
    architecture = (values.get("architectures") or [""])[0]
    model_type = "llama" if architecture == INTERNLM2 else values.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"its language model {architecture or model_type!r} is not converted: InternLM2 is, and what transformers "
            "has a class of its own for (Qwen2, Llama, ...)"
        )
    if architecture == INTERNLM2 and values.get("bias"):
        raise ModelError("its language model is an InternLM2 with biases (llm_config.bias), which is not converted")
    kind: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} - {
        field.name for field in dataclasses.fields(PretrainedConfig)
    }
    taken = {name: value for name, value in values.items() if name in known or name in _COMMON}
    return taken | {"model_type": model_type}
