"""Temperature tuning (Llama 4): queries grow with the logarithm of their position in layers without rotation.

transformers counts the rows of the forward, which are positions only when one sequence is computed from its start.
Here the rows are those of a packed step, so the hook puts the position's factor in place of the row's.
Source: "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvarena.engine.attention.base import AttentionMetadata


def is_tuned(module: nn.Module) -> bool:
    """Whether the attention layer scales its queries by row."""
    return bool(module.__dict__.get("attn_temperature_tuning")) and not module.__dict__.get("use_rope")


def by_position(query: Tensor, module: nn.Module, meta: AttentionMetadata) -> Tensor:
    """Queries scaled by row, [1, num_heads, T, head_dim], to queries scaled by position."""
    row = torch.arange(query.shape[2], device=query.device)
    lens = meta.query_start_loc.diff()
    last = (meta.seq_lens - meta.query_start_loc[1:]).repeat_interleave(lens, output_size=len(row))
    floor_scale, attn_scale = module.__dict__["floor_scale"], module.__dict__["attn_scale"]

    def factor(index: Tensor) -> Tensor:
        return torch.log1p(torch.floor((index.float() + 1.0) / floor_scale)) * attn_scale + 1.0

    return (query * (factor(row + last) / factor(row))[:, None]).to(query.dtype)
