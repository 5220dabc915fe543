"""The language models of Qwen2.5-VL and Qwen3-VL as causal language models, which transformers has only with a tower.

Their parts are the library's and have the names of any decoder of the llama shape: `model.layers`, `lm_head`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class Qwen25TextConfig(Qwen2_5_VLTextConfig):
    """Of its own class, because transformers' table takes no class for one of its own configs."""


class Qwen3TextConfig(Qwen3VLTextConfig):
    """See `Qwen25TextConfig`."""


class _Head:
    """What a causal language model has beside its decoder."""

    model: nn.Module
    lm_head: nn.Linear

    def forward(
        self, *, position_ids: Tensor | None = None, logits_to_keep: int | Tensor = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Logits of the tokens that `logits_to_keep` names as in transformers' classes; the rest is the decoder's."""
        out = self.model(position_ids=position_ids, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


class Qwen25VLForCausalLM(_Head, Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """Qwen2.5-VL's language model."""

    config_class = Qwen25TextConfig
    _tied_weights_keys = _TIED

    def __init__(self, config: Qwen25TextConfig) -> None:
        super().__init__(config)
        self.model = Qwen2_5_VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Qwen3VLForCausalLM(_Head, Qwen3VLPreTrainedModel, GenerationMixin):
    """Qwen3-VL's language model."""

    config_class = Qwen3TextConfig
    _tied_weights_keys = _TIED

    def __init__(self, config: Qwen3TextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def causal_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same config of a language model, for which transformers' table then has a causal one."""
    kind, model = (
        (Qwen25TextConfig, Qwen25VLForCausalLM)
        if isinstance(config, Qwen2_5_VLTextConfig)
        else (Qwen3TextConfig, Qwen3VLForCausalLM)
    )
    AutoModelForCausalLM.register(kind, model, exist_ok=True)
    return kind.from_dict(config.to_dict())
