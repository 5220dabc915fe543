"""The config of a model that reads images, and its language model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.checkpoints.images import QWEN
from kvarena.engine.checkpoints.internvl import NATIVE, ORIGINAL
from kvarena.engine.errors import ModelError
from kvarena.engine.vision.internvl_config import converted


def whole_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The config of any format as transformers' own class.

    Args:
        values: config.json of a model that reads images.

    Raises:
        ModelError: its language model is not one that is converted, or a field has no valid value.
    """
    model_type = values["model_type"]
    text = {ORIGINAL: "llm_config", NATIVE: "text_config"}.get(model_type)
    for name in ("vision_config", text):
        # The class would take a large model's sizes for it.
        if name is not None and (not isinstance(values.get(name), Mapping) or not values[name]):
            raise ModelError(f"it has no {name}, which the config of a model that reads images must have")
    try:
        return converted(values) if model_type == ORIGINAL else CONFIG_MAPPING[model_type].from_dict(dict(values))
    except ModelError:
        raise
    # Anything: config classes check their fields in many ways.
    except Exception as error:
        raise ModelError(f"the config is not a valid one of {model_type}: {one_line(error)}") from error


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's own config, with what the whole config says in its place."""
    text = copy.deepcopy(config.text_config)
    assert isinstance(text, PretrainedConfig)
    dtype = config.dtype or text.dtype
    if config.model_type in QWEN:
        # Imported here: of other models nothing of it is needed.
        from kvarena.engine.vision.qwen_text import causal_config

        text = causal_config(text)
        text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = dtype
    return text
