"""A small config of every causal language model class of transformers, with every window shorter than a prompt.

`small_config(model_type)` takes the class's own defaults and makes small what is a size, by the names that config
classes give to sizes; `OVERRIDES` holds what a family needs besides. Windows and attention chunks become 8 tokens,
temperature steps 4, a selection of keys 4: a prompt of 13 tokens crosses all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW, KEPT_KEYS, FLOOR = 8, 4, 4
VOCAB_SIZE = 128
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 4, 64, 96, 4, 2, 16

_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input"),
    (
        LAYERS,
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers",
    ),
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim embedding_size embedding_dim input_embedding_size output_embedding_size "
        "cross_attention_hidden_size word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size "
        "dim_model",
    ),
    (
        INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner dim_ff dff feed_forward_size "
        "ffn_hidden_size dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads",
    ),
    (KV_HEADS, "num_key_value_heads n_kv_heads num_kv_heads"),
    (
        HEAD_DIM,
        "head_dim attention_head_size d_head dim_head kv_channels attention_head_dim v_head_dim q_lora_rank "
        "kv_lora_rank qk_nope_head_dim hidden_size_per_layer_input index_head_dim pronunciation_embed_dim "
        "shape_embed_dim linear_key_head_dim linear_value_head_dim o_lora_rank gated_norm_rank swa_head_dim",
    ),
    (8, "qk_rope_head_dim rotary_dim"),
    (32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads index_n_heads"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token linear_num_key_heads"),
    (
        1,
        "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace num_dense_layers "
        "moe_num_shared_experts max_window_layers ngram",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_sequence_length seq_length max_seq_len context_length "
        "max_target_positions",
    ),
    (
        WINDOW,
        "sliding_window window_size attention_window_size attention_chunk_size sliding_window_size local_attention "
        "swa_window_size attention_window",
    ),
    (KEPT_KEYS, "index_topk keep_window_size"),
    (FLOOR, "floor_scale"),
    (True, "use_sliding_window is_decoder"),
)
SIZES = {name: value for value, names in _NAMES for name in names.split()}
SIZES |= {"use_sliding_window": True, "is_decoder": True, "n_group": 1, "pad_token_id": 0, "bos_token_id": 1}
SIZES |= {"tie_word_embeddings": False}  # tied random weights repeat the last token
SIZES |= {"sliding_window_pattern": 2, "global_attn_every_n_layers": 2}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_MUSIC = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "cohere_compass_text": _MIXED | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 3},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "gemma4": {"text_config": {"global_head_dim": HEAD_DIM}},
    "gemma4_text": {"global_head_dim": HEAD_DIM},
    "gemma4_unified": {"text_config": {"global_head_dim": HEAD_DIM}},
    "gemma4_unified_text": {"global_head_dim": HEAD_DIM},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32, "n_groups": 1, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"]},
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def class_names() -> dict[str, str]:
    """Every causal language model class, and the first model type that maps to it."""
    found: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name if isinstance(name, str) else name[0], model_type)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def small_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The small config of a model type. `overrides` go before everything else."""
    return CONFIG_MAPPING[model_type](
        **small_fields(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | overrides)
    )


def small_fields(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """What to hand to `config_class` so that its model is small."""
    own = {field.name: field for field in dataclasses.fields(config_class)}
    fields: dict[str, Any] = {name: value for name, value in SIZES.items() if name in own}
    if "kv_lora_rank" in own:  # every head has its own keys, once they are expanded
        fields |= {"num_key_value_heads": HEADS, "head_dim": 8} if "head_dim" in own else {"num_key_value_heads": HEADS}
    if "eos_token_id" in own:
        fields["eos_token_id"] = None
    for name, sub in (config_class.sub_configs or {}).items():
        if name in own and isinstance(sub, type) and dataclasses.is_dataclass(sub):
            fields[name] = small_fields(sub, overrides.get(name, {}))
        elif name in own and "model_type" in overrides.get(name, {}):
            kind = overrides[name]["model_type"]
            fields[name] = small_fields(CONFIG_MAPPING[kind], overrides[name])
    # Sections were merged above.
    return fields | {name: value for name, value in overrides.items() if not isinstance(fields.get(name), dict)}
