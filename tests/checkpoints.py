"""Small random checkpoints in the real on-disk format, and transformers' own greedy tokens for them.

Matrices are drawn with a standard deviation of 0.15: with the usual 0.02 the logits of a random model are all but
equal, and a comparison of argmaxes would test rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# What each family adds to BASE; the model type is the key unless stated.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    "stablelm": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": False},
    "phi3": {"sliding_window": 8},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}


def write_checkpoint(directory: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write config.json and model.safetensors of a small random model; returns `directory`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(BASE | FAMILIES.get(family, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory


@cache
def random_prompts(lens: tuple[int, ...], vocab_size: int = 128, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Prompts of the given lengths; ids 0 and 1 are left out."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(2, vocab_size, (n,), generator=generator).tolist()) for n in lens)
