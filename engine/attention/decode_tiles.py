"""Decode rows: one query per request, its context read in tiles of about 64 tokens.

    request 0   | tile | tile | ti..|            contexts are cut into tiles of whole blocks,
    request 1   | tile |                         all tiles of all requests form one batch of products,
    request 2   | tile | t...|                   and the partial softmaxes are merged per request

No row is padded to another's length; only a request's last tile is part empty. This is split-KV decoding
(Flash-Decoding, Dao et al. 2023) written as batched products.

The KV heads of a tile stay interleaved as the pool stores them, [tokens, heads * head_dim]: the query becomes block
diagonal, which spends products on zeros and saves the copy into head-major order. `HEADS_PER_PRODUCT` bounds that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.addressing import block_ids
from kvarena.engine.attention.scratch import Scratch

TILE_TOKENS = 64
HEADS_PER_PRODUCT = 4
# Tiles of one pass: K and V of a pass should stay in the CPU's cache between gathering and multiplying.
PASS_BYTES = 4 * 2**20


class _Chunk(NamedTuple):
    """Tiles [begin, end), done in one pass.

    Attributes:
        begin, end: tiles.
        block_begin, block_end: their part of `DecodeTiles.blocks`.
        edges: int64 [num_edges], those of them that hold tokens that may not be seen, counted from `begin`.
        edge_masks: fp32 [num_edges, 1, tile_tokens], 0 or -inf.
    """

    begin: int
    end: int
    block_begin: int
    block_end: int
    edges: Tensor
    edge_masks: Tensor


class DecodeTiles(NamedTuple):
    """The tiles of n decode rows.

    Attributes:
        num_rows: n.
        max_tiles: most tiles of one row.
        blocks: int64 [num_tiles * blocks_per_tile], the null block where a tile is part empty.
        tile_to_row: int64 [num_tiles].
        tile_to_cell: int64 [num_tiles], row * max_tiles + index within the row.
        chunks: the passes.
    """

    num_rows: int
    max_tiles: int
    blocks: Tensor
    tile_to_row: Tensor
    tile_to_cell: Tensor
    chunks: list[_Chunk]


def plan_tiles(
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    block_size: int,
    window: int | None,
    token_bytes: int,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> DecodeTiles:
    """Cut the contexts of n decode rows into tiles.

    Args:
        block_table: int [n, width].
        seq_lens: int [n]; the query is at position seq_len - 1.
        block_size: slots per block.
        window: keys at positions below seq_len - window are not seen.
        token_bytes: fp32 bytes of one token's keys (or values) in one layer.
        device: where the plan's tensors go.
        contiguous: see `block_ids`.
    """
    blocks_per_tile = max(1, TILE_TOKENS // block_size)
    tile_tokens = blocks_per_tile * block_size
    seq_lens = seq_lens.astype(np.int64)
    first_seen = np.zeros_like(seq_lens) if window is None else np.maximum(seq_lens - window, 0)
    first_block = first_seen // block_size
    end_block = -(-seq_lens // block_size)
    num_tiles = -(-(end_block - first_block) // blocks_per_tile)
    tile_to_row = np.repeat(np.arange(len(seq_lens)), num_tiles)
    last_tile = np.cumsum(num_tiles) - 1
    index_in_row = np.arange(len(tile_to_row)) - (last_tile - num_tiles + 1)[tile_to_row]

    tile_block = first_block[tile_to_row] + index_in_row * blocks_per_tile
    block_index = tile_block[:, None] + np.arange(blocks_per_tile)
    blocks = block_ids(block_table, tile_to_row, block_index, end_block[tile_to_row], contiguous=contiguous)

    edges = last_tile if window is None else np.unique(np.concatenate([last_tile, last_tile - num_tiles + 1]))
    positions = tile_block[edges][:, None] * block_size + np.arange(tile_tokens)
    rows = tile_to_row[edges]
    hidden = (positions >= seq_lens[rows][:, None]) | (positions < first_seen[rows][:, None])
    masks = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None]

    chunks = []
    step = max(1, PASS_BYTES // (tile_tokens * token_bytes))
    for begin in range(0, len(tile_to_row), step):
        end = min(begin + step, len(tile_to_row))
        part = slice(*np.searchsorted(edges, (begin, end)))
        chunks.append(
            _Chunk(
                begin,
                end,
                begin * blocks_per_tile,
                end * blocks_per_tile,
                torch.from_numpy(edges[part] - begin).to(device),
                torch.from_numpy(masks[part]).to(device),
            )
        )
    max_tiles = int(num_tiles.max())
    return DecodeTiles(
        num_rows=len(seq_lens),
        max_tiles=max_tiles,
        blocks=torch.from_numpy(blocks.reshape(-1)).to(device),
        tile_to_row=torch.from_numpy(tile_to_row).to(device),
        tile_to_cell=torch.from_numpy(tile_to_row * max_tiles + index_in_row).to(device),
        chunks=chunks,
    )


def attend_tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: DecodeTiles,
    scratch: Scratch,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one query per row.

    Args:
        q: [n, num_heads, head_dim].
        keys, values: a layer of the pool by block, [num_blocks + 1, block_size, num_kv_heads, head_dim].
        tiles: from `plan_tiles`.
        scratch: buffers to reuse.
        scale, softcap, sinks: see `AttentionBackend.attend`.

    Returns:
        [n, num_heads, head_dim] in q's dtype.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = keys.shape[2]
    num_tiles = len(tiles.tile_to_row)
    groups = _head_groups(num_kv_heads)
    queries = [_block_diagonal(q, num_kv_heads, begin, end, scale) for begin, end in groups]
    # Of each tile: the softmax's result over the tile alone, and the logarithm of its denominator.
    partial = torch.empty(num_tiles, num_kv_heads, num_heads // num_kv_heads, head_dim, device=q.device)
    lse = torch.empty(num_tiles, num_heads, device=q.device)
    for chunk in tiles.chunks:
        rows = tiles.tile_to_row[chunk.begin : chunk.end]
        k, v = (
            scratch.gather(name, cache, tiles.blocks[chunk.block_begin : chunk.block_end], torch.float32).view(
                len(rows), -1, num_kv_heads, head_dim
            )
            for name, cache in (("keys", keys), ("values", values))
        )
        for (begin, end), query in zip(groups, queries, strict=True):
            scores = torch.bmm(query.index_select(0, rows), k[:, :, begin:end].flatten(2).transpose(1, 2))
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores.index_add_(0, chunk.edges, chunk.edge_masks.expand(-1, scores.shape[1], -1))
            peak = scores.amax(-1, keepdim=True)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            product = torch.bmm(weights, v[:, :, begin:end].flatten(2)).div_(total)
            own = product.view(len(rows), end - begin, -1, end - begin, head_dim).diagonal(dim1=1, dim2=3)
            partial[chunk.begin : chunk.end, begin:end] = own.permute(0, 3, 1, 2)
            heads = slice(begin * num_heads // num_kv_heads, end * num_heads // num_kv_heads)
            lse[chunk.begin : chunk.end, heads] = total.log_().add_(peak).squeeze(-1)
    return _merge(partial.view(num_tiles, num_heads, head_dim), lse, tiles, sinks).to(q.dtype)


def _head_groups(num_kv_heads: int) -> list[tuple[int, int]]:
    """KV heads [begin, end) of each product."""
    return [
        (begin, min(begin + HEADS_PER_PRODUCT, num_kv_heads)) for begin in range(0, num_kv_heads, HEADS_PER_PRODUCT)
    ]


def _block_diagonal(q: Tensor, num_kv_heads: int, begin: int, end: int, scale: float) -> Tensor:
    """Scaled fp32 queries of KV heads [begin, end), each zero outside its own head's columns.

    Returns:
        [n, query heads of the group, (end - begin) * head_dim].
    """
    num_rows, num_heads, head_dim = q.shape
    own = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)[:, begin:end]
    diagonal = torch.eye(end - begin, device=q.device).mul_(scale).view(1, end - begin, 1, end - begin, 1)
    return (own.float().unsqueeze(3) * diagonal).view(num_rows, -1, (end - begin) * head_dim)


def _merge(partial: Tensor, lse: Tensor, tiles: DecodeTiles, sinks: Tensor | None) -> Tensor:
    """Merge the tiles of each row: a softmax over their logarithmic denominators weighs them."""
    num_heads = lse.shape[1]
    width = tiles.max_tiles
    cells = lse.new_full((tiles.num_rows * width, num_heads), -torch.inf)
    cells.index_copy_(0, tiles.tile_to_cell, lse)
    cells = cells.view(tiles.num_rows, width, num_heads)
    if sinks is not None:
        sink = sinks.float().view(1, 1, num_heads).expand(tiles.num_rows, 1, num_heads)
        weights = torch.cat([cells, sink], dim=1).softmax(1)[:, :width].reshape(-1, num_heads)
    else:
        weights = cells.softmax(1).view(-1, num_heads)
    partial = partial.mul_(weights.index_select(0, tiles.tile_to_cell).unsqueeze(-1))
    out = partial.new_zeros(tiles.num_rows, *partial.shape[1:])
    return out.index_add_(0, tiles.tile_to_row, partial)
