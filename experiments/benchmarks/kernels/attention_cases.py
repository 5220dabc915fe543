"""Attention batches at real shapes for the kernel benchmark: inputs on the GPU, what they cost, and a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two passes over at least so many bytes never meet the same line in the L2 cache (60 MB on an H200).
ROTATED_BYTES = 2**30


@dataclass(frozen=True)
class AttentionShape:
    """Heads of a model's attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = AttentionShape("llama-3.1-8b", 32, 8, 128)
QWEN3_06B = AttentionShape("qwen3-0.6b", 16, 8, 128)
OPT_13B = AttentionShape("opt-13b", 40, 40, 128)


@dataclass
class Batch:
    """Inputs of one attention call per layer, for several layers of a pool.

    Attributes:
        shape: the heads.
        starts, query_lens: int64 [B], context before this step, and new tokens.
        q: bf16 [T, num_heads, head_dim].
        keys, values: bf16 [layers, slots, num_kv_heads, head_dim].
        block_table: int32 [B, width].
        block_size: slots per block.
    """

    shape: AttentionShape
    starts: np.ndarray
    query_lens: np.ndarray
    q: Tensor
    keys: Tensor
    values: Tensor
    block_table: Tensor
    block_size: int

    @property
    def seq_lens(self) -> np.ndarray:
        """Context lengths, new tokens among them."""
        return self.starts + self.query_lens

    @property
    def query_start_loc(self) -> np.ndarray:
        """Int32 [B + 1]."""
        return np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes that one layer's attention must move: every key and value once, queries in, results out."""
        tokens = int(self.seq_lens.sum()) * self.shape.num_kv_heads * 2 + 2 * len(self.q) * self.shape.num_heads
        return tokens * self.shape.head_dim * 2

    @property
    def num_flops(self) -> int:
        """Operations of one layer's causal attention."""
        pairs = visible_pairs(self.starts, self.query_lens)
        return 4 * pairs * self.shape.num_heads * self.shape.head_dim


def visible_pairs(starts: np.ndarray, query_lens: np.ndarray) -> int:
    """(query, key) pairs that causal attention computes."""
    starts, query_lens = starts.astype(np.int64), query_lens.astype(np.int64)
    return int((starts * query_lens + query_lens * (query_lens + 1) // 2).sum())


def make_batch(
    shape: AttentionShape, rows: list[tuple[int, int]], *, block_size: int = 16, contiguous: bool = False, seed: int = 0
) -> Batch:
    """Random inputs; blocks are scattered over the pool, or consecutive when `contiguous`.

    Args:
        shape: the heads.
        rows: (context before this step, new tokens) of each request.
        block_size: slots per block.
        contiguous: consecutive block ids per request.
        seed: of inputs and placement.
    """
    torch.manual_seed(seed)
    starts, query_lens = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    num_blocks = -(-(starts + query_lens) // block_size)
    total = int(num_blocks.sum())
    ids = torch.arange(1, total + 1) if contiguous else torch.randperm(total) + 1
    table = torch.zeros(len(rows), int(num_blocks.max()), dtype=torch.int32)
    for row, part in enumerate(ids.split(num_blocks.tolist())):
        table[row, : len(part)] = part
    layer = (total + 1) * block_size * shape.num_kv_heads * shape.head_dim
    num_layers = max(2, min(32, ROTATED_BYTES // (4 * layer) + 1))
    pool = torch.randn(
        2,
        num_layers,
        (total + 1) * block_size,
        shape.num_kv_heads,
        shape.head_dim,
        dtype=torch.bfloat16,
        device="cuda",
    )
    q = torch.randn(int(query_lens.sum()), shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    return Batch(shape, starts, query_lens, q, pool[0], pool[1], table.cuda(), block_size)


def relative_error(batch: Batch, layer: int, out: Tensor, scale: float, max_rows: int = 3) -> float:
    """||out - exact|| / ||exact|| over some requests' last queries, in float64."""
    loc, lens = batch.query_start_loc, batch.seq_lens
    error = norm = 0.0
    for row in np.linspace(0, len(lens) - 1, min(max_rows, len(lens))).astype(int):
        positions = torch.arange(int(lens[row]), device=out.device)
        slots = batch.block_table[row][positions // batch.block_size].long() * batch.block_size
        slots += positions % batch.block_size
        group = batch.shape.num_heads // batch.shape.num_kv_heads
        k, v = (part[layer][slots].double().repeat_interleave(group, 1) for part in (batch.keys, batch.values))
        num_queries = min(4, int(batch.query_lens[row]))
        end = int(loc[row + 1])
        q = batch.q[end - num_queries : end].double()
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        query_at = torch.arange(int(lens[row]) - num_queries, int(lens[row]), device=out.device)
        scores = scores.masked_fill(positions[None, None] > query_at[None, :, None], -torch.inf)
        exact = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        error += float((out[end - num_queries : end].double() - exact).square().sum())
        norm += float(exact.square().sum())
    return (error / norm) ** 0.5


def unequal_rows(results: Sequence[Tensor], wanted: Tensor, most: float = 0.0) -> dict[str, Any]:
    """Of results of one launch, the rows that differ from those wanted.

    Args:
        results: any number of [rows, heads, head_dim].
        wanted: the same shape.
        most: ||row - wanted|| / ||wanted|| up to which a row is equal; 0: bit by bit.

    Returns:
        `rows` that differ in any result, `nans` rows that have one, `largest` relative difference of a row without
        (None: all have one) and `first`, up to 8 of the rows that differ or have a NaN.
    """
    ranges, exact = range(1, wanted.ndim), wanted.float()
    differ = torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
    nans, largest = differ.clone(), torch.full((len(wanted),), -1.0, device=wanted.device)
    for result in results:
        far = (result.float() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        lost = result.isnan().any(dim=tuple(ranges))
        nans |= lost
        largest = torch.where(lost, largest, torch.maximum(largest, far))
        differ |= (far > most) | lost if most else (result != wanted).any(dim=tuple(ranges)) | lost
    first = differ.nonzero().flatten()[:8].tolist()
    found = float(largest.max())
    return {
        "rows": int(differ.sum()), "nans": int(nans.sum()), "largest": None if found < 0 else float(f"{found:.2e}"),
        "first": first,
    }  # fmt: skip
