"""The memory-bound kernels at the sizes of real models, for the kernel benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.kernels.activation import gated
from kvarena.engine.kernels.norm import rms_norm
from kvarena.engine.kernels.rope import rope_store
from kvarena.engine.kernels.store import gather_kv, store_kv
from kvarena.experiments.benchmarks.kernels.attention_cases import LLAMA_8B, QWEN3_06B, ROTATED_BYTES, AttentionShape
from kvarena.experiments.gpu.timing import time_launches

# Heads, hidden size, intermediate size, whether heads are normed.
MODELS = ((LLAMA_8B, 4096, 14336, False), (QWEN3_06B, 1024, 3072, True))
NUM_TOKENS = (1, 32, 256, 8192, 65536)


def bench_fused() -> Iterator[dict[str, Any]]:
    """Time norm, activation, rotary embedding with store, and plain store; a line each, with the `bytes` it moves."""
    for (shape, hidden, inner, has_norms), tokens in product(MODELS, NUM_TOKENS):
        num_sets = max(1, min(20, ROTATED_BYTES // (tokens * inner * 4)))
        calls: dict[str, list[Callable[[], object]]] = {}
        for _ in range(num_sets):
            for name, call in _calls(shape, hidden, inner, tokens, has_norms).items():
                calls.setdefault(name, []).append(call)
        kv_size = shape.num_kv_heads * shape.head_dim
        sizes = {
            "norm": 4 * hidden,
            "activation": 3 * inner,
            "rope": 2 * (shape.num_heads * shape.head_dim + 2 * kv_size),
            "rope, keys in place too": 2 * (shape.num_heads * shape.head_dim + 2 * kv_size) + kv_size,
            "store": 4 * kv_size,
            "gather": 4 * kv_size,
        }
        for name, launches in calls.items():
            us = round(time_launches(launches), 2)
            num_bytes = 2 * tokens * sizes[name]
            yield {"kernel": name, "shape": shape.name, "case": f"{tokens} tokens", "us": us, "bytes": num_bytes}


def _calls(
    shape: AttentionShape, hidden: int, inner: int, tokens: int, has_norms: bool
) -> dict[str, Callable[[], object]]:
    """One call of each kernel, on inputs of its own."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    slots = torch.randperm(tokens + 16, device="cuda")[:tokens]
    keys, values = _rand(2, tokens + 16, kv_heads, head_dim).unbind()
    q, k, v = _rand(tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 1)
    cos, sin = torch.randn(2, tokens, head_dim // 2, device="cuda").unbind()
    new_k, new_v = _rand(2, tokens, kv_heads, head_dim).unbind()
    weight = _rand(head_dim) if has_norms else None
    rope = partial(rope_store, q, k, v, torch.empty(q.shape, dtype=q.dtype, device="cuda"), cos=cos, sin=sin)
    rope = partial(rope, rotary_dim=head_dim, keys=keys, values=values, slot_mapping=slots)
    x, residual, out = _rand(3, tokens, hidden).unbind()
    return {
        "norm": partial(rms_norm, x, _rand(hidden), 1e-6, residual=residual, out=out),
        "activation": partial(gated, _rand(tokens, 2 * inner), out=_rand(tokens, inner)),
        "rope": partial(rope, q_norm=weight, k_norm=weight),
        "rope, keys in place too": partial(rope, q_norm=weight, k_norm=weight, turn_keys=True),
        "store": partial(store_kv, k, v, keys, values, slots),
        "gather": partial(gather_kv, new_k, new_v, keys, values, slots),
    }


def _rand(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.bfloat16, device="cuda")
