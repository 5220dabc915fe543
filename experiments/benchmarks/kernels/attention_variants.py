"""What the kernel benchmark measures of attention: cases, the variants that `--tune` tries, the library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvarena.engine.attention.dense import DensePrompts
from kvarena.engine.kernels.attention.config import DecodeConfig, PrefillConfig
from kvarena.engine.kernels.store import gather_kv
from kvarena.experiments.benchmarks.kernels.attention_cases import AttentionShape, Batch

Rows = list[tuple[int, int]]

_RANDOM = np.random.default_rng(0)
# (context before the step, new tokens) of each request.
DECODE_CASES: dict[str, Rows] = {
    "1 x 8192": [(8191, 1)],
    "32 x 8192": [(8191, 1)] * 32,
    "256 x 8192": [(8191, 1)] * 256,
    "1 x 1024": [(1023, 1)],
    "8 x 1024": [(1023, 1)] * 8,
    "32 x 1024": [(1023, 1)] * 32,
    "256 x 1024": [(1023, 1)] * 256,
    "256 x 100..2000": [(int(n), 1) for n in _RANDOM.integers(100, 2000, 256)],
    "64 x 600, 1 x 32768": [(599, 1)] * 63 + [(32767, 1)],
}
PREFILL_CASES: dict[str, Rows] = {
    "16 x 4096": [(0, 4096)] * 16,
    "2 x 4096": [(0, 4096)] * 2,
    "16 x 562": [(0, 562)] * 16,
    "2048 after 6144": [(6144, 2048)],
    "4 x 512 after 1536": [(1536, 512)] * 4,
}
# PagedAttention's Figure 18(a): batch size and context length.
FIGURE_18_CASES: dict[str, Rows] = {
    f"{batch} x {context}": [(context - 1, 1)] * batch for batch in (8, 32) for context in (64, 128, 256)
}
# Other block sizes and the contiguous switch: (block size, contiguous).
POOLS = ((1, False), (64, False), (256, False), (16, True))

# Tile, warps, stages. The first ones are tried for every shape of heads, the others for the first shape alone.
DECODE_TILES = [(64, 4, 3), (64, 4, 4), (32, 2, 4), (64, 4, 2), (64, 8, 3), (128, 4, 2), (64, 2, 3), (32, 4, 5)]
NUM_COMMON_TILES = 3
# Programs per multiprocessor and fewest tokens of a part, by the batch size.
DECODE_SPLITS = {
    1: [(1, 64), (2, 64), (4, 64), (2, 128)],
    8: [(1, 128), (2, 128), (4, 64)],
    32: [(1, 128), (2, 128), (4, 128), (16, 256)],
    256: [(2, 128), (16, 256)],
}
# Rows, tile, warps, stages, registers.
PREFILL_TILES = [
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 64, 8, 2),
    PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 32, 8, 3, 128),
    PrefillConfig(128, 32, 8, 4, 128),
    PrefillConfig(64, 64, 4, 2),
    PrefillConfig(64, 32, 4, 3),
]


def decode_variants(default: DecodeConfig, batch_size: int, tiles: list[tuple[int, int, int]]) -> list[DecodeConfig]:
    """The default, and every one of `tiles` with every split that suits the batch size."""
    variants = [
        DecodeConfig(tile, warps, stages, programs, max(chunk, tile), 168 if warps == 4 and tile < 128 else None)
        for (tile, warps, stages), (programs, chunk) in product(tiles, DECODE_SPLITS.get(batch_size, [(2, 128)]))
    ]
    return list(dict.fromkeys([default, *variants]))


def dense_call(batch: Batch, *, handed_over: bool) -> tuple[Callable[[], Tensor | None], Tensor] | None:
    """The engine's path for whole prompts of equal length: a call over layer 0, and its result. None for other steps.

    Args:
        batch: with queries that are rotated in place in a packed projection.
        handed_over: the new keys and values lie in that projection, and not in the pool alone.
    """
    shape = batch.shape
    prompts = DensePrompts(SDPBackend.CUDNN_ATTENTION)
    for _ in range(2):
        rows = prompts.shape(batch.query_start_loc, batch.seq_lens)
    if rows is None:
        return None
    loc = torch.arange(len(batch.q), device=batch.q.device)
    positions = loc % rows[1]
    blocks = batch.block_table[loc // rows[1], positions // batch.block_size].long()
    slots = blocks * batch.block_size + positions % batch.block_size
    keys, values = batch.keys[0], batch.values[0]
    packed = torch.cat([batch.q, keys[slots], values[slots]], dim=1)
    q, k, v = packed.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)

    def call() -> Tensor | None:
        if handed_over:
            return prompts.attend(q, k, v, rows, shape.head_dim**-0.5)
        own = keys.new_empty(2, *k.shape)
        gather_kv(own[0], own[1], keys, values, slots)
        return prompts.attend(q, own[0], own[1], rows, shape.head_dim**-0.5)

    out = call()
    if out is None:
        raise RuntimeError("cuDNN's attention does not take these tensors")
    return call, out


def library_calls(shape: AttentionShape, rows: Rows) -> dict[str, Callable[[], object]]:
    """PyTorch's attention kernels on fresh prompts of equal length, without a pool."""
    count, length = len(rows), rows[0][1]
    scale = shape.head_dim**-0.5
    total = count * length
    q = torch.randn(total, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, total, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda").unbind()
    loc = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")

    def dense(backend: SDPBackend) -> object:
        query, key, value = (x.view(count, length, -1, shape.head_dim).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def flash() -> object:
        return torch.ops.aten._flash_attention_forward(q, k, v, loc, loc, length, length, 0.0, True, False, scale=scale)

    def varlen() -> object:
        return torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, loc, loc, length, length, False, 0.0, True, False, scale=scale
        )

    return {
        "flash varlen": flash,
        "cudnn varlen": varlen,
        "sdpa cudnn, dense": partial(dense, SDPBackend.CUDNN_ATTENTION),
    }
