"""Rows of several new tokens, padded into a few rectangles for scaled_dot_product_attention.

Rows are sorted by length and put into one group while padding stays a modest share of it, so there are few groups
whatever the batch. A row whose mask would be large is cut into pieces along its queries first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvarena.engine.attention.addressing import block_ids
from kvarena.engine.attention.scratch import Scratch

# Query x key pairs of one group's mask.
MASK_PAIRS = 2**20
# Padded pairs may be so many times the wanted ones.
MAX_PADDING = 1.25


class _Piece(NamedTuple):
    """Queries at positions [start, stop) of batch row `row`; the first one is flat token `token`."""

    row: int
    token: int
    start: int
    stop: int


class PrefillGroup(NamedTuple):
    """A rectangle of n pieces, `max_queries` by the tokens of `blocks_per_piece` blocks.

    Attributes:
        num_pieces: n.
        max_queries: queries of the longest piece.
        query_tokens: int64 [n * max_queries], flat token of each query; padding repeats the piece's last token.
        out_cells: int64 [tokens of the group], the rectangle's cell of each wanted query.
        out_tokens: int64 [tokens of the group], its flat token.
        blocks: int64 [n * blocks_per_piece].
        mask: [n, 1, max_queries, keys], 0 or -inf; None when plain causal attention from position 0 is right.
    """

    num_pieces: int
    max_queries: int
    query_tokens: Tensor
    out_cells: Tensor
    out_tokens: Tensor
    blocks: Tensor
    mask: Tensor | None


def plan_groups(
    rows: np.ndarray,
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    block_table: np.ndarray,
    block_size: int,
    window: int | None,
    explicit: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> list[PrefillGroup]:
    """Put the prefill rows of a batch into groups.

    Args:
        rows: batch rows, of any number of new tokens.
        query_start_loc, seq_lens: of the whole batch, host arrays.
        block_table: int [B, width].
        block_size: slots per block.
        window: sliding window, or None.
        explicit: the group's scores will be computed explicitly and need a mask, in fp32.
        dtype: the pool's dtype, that of the other masks.
        device: where the plan's tensors go.
        contiguous: see `block_ids`.
    """
    pieces: list[_Piece] = []
    for row in rows.tolist():
        token, stop = int(query_start_loc[row]), int(seq_lens[row])
        start = stop - (int(query_start_loc[row + 1]) - token)
        masked = explicit or start > 0 or window is not None
        step = max(1, MASK_PAIRS // stop) if masked else stop
        pieces += [_Piece(row, token + at - start, at, min(at + step, stop)) for at in range(start, stop, step)]
    pieces.sort(key=lambda piece: (piece.stop - piece.start, piece.stop))
    mask_dtype = torch.float32 if explicit else dtype
    return [
        _group(members, block_table, block_size, window, explicit, mask_dtype, device, contiguous)
        for members in _pack(pieces)
    ]


def _pack(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Cut the sorted pieces into runs whose rectangles are mostly wanted pairs."""
    groups: list[list[_Piece]] = []
    wanted = longest = 0
    for piece in pieces:
        queries, keys = piece.stop - piece.start, piece.stop
        if groups:
            padded = (len(groups[-1]) + 1) * queries * max(longest, keys)
            if padded <= min(MASK_PAIRS, MAX_PADDING * (wanted + queries * keys)):
                groups[-1].append(piece)
                wanted += queries * keys
                longest = max(longest, keys)
                continue
        groups.append([piece])
        wanted, longest = queries * keys, keys
    return groups


def _group(
    pieces: list[_Piece],
    block_table: np.ndarray,
    block_size: int,
    window: int | None,
    explicit: bool,
    mask_dtype: torch.dtype,
    device: torch.device,
    contiguous: bool,
) -> PrefillGroup:
    row, token, start, stop = (np.array(column, dtype=np.int64) for column in zip(*pieces, strict=True))
    num_queries = stop - start
    max_queries = int(num_queries.max())
    columns = np.arange(max_queries)
    offset = np.minimum(columns, num_queries[:, None] - 1)
    first_block = np.zeros_like(start) if window is None else np.maximum(start - window + 1, 0) // block_size
    end_block = -(-stop // block_size)
    block_index = first_block[:, None] + np.arange(int((end_block - first_block).max()))
    blocks = block_ids(block_table, row, block_index, end_block, contiguous=contiguous)
    mask = None
    if explicit or window is not None or start.any():
        keys = (first_block * block_size)[:, None] + np.arange(block_index.shape[1] * block_size)
        queries = start[:, None] + offset
        seen = keys[:, None, :] <= queries[:, :, None]
        if window is not None:
            seen &= keys[:, None, :] > queries[:, :, None] - window
        host_mask = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
        mask = torch.from_numpy(host_mask).to(device, mask_dtype)
    wanted = columns < num_queries[:, None]
    return PrefillGroup(
        num_pieces=len(pieces),
        max_queries=max_queries,
        query_tokens=torch.from_numpy((token[:, None] + offset).reshape(-1)).to(device),
        out_cells=torch.from_numpy(np.flatnonzero(wanted)).to(device),
        out_tokens=torch.from_numpy((token[:, None] + offset)[wanted]).to(device),
        blocks=torch.from_numpy(blocks.reshape(-1)).to(device),
        mask=mask,
    )


def attend_group(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    group: PrefillGroup,
    scratch: Scratch,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attention of one group's queries, written to their rows of `out`.

    Args:
        q, out: [T, num_heads, head_dim].
        keys, values: a layer of the pool by block, [num_blocks + 1, block_size, num_kv_heads, head_dim].
        group: from `plan_groups`.
        scratch: buffers to reuse.
        scale, softcap, sinks: see `AttentionBackend.attend`.
    """
    num_heads, head_dim = q.shape[1:]
    # [n, heads, queries or keys, head_dim]
    query = q.index_select(0, group.query_tokens).view(group.num_pieces, -1, num_heads, head_dim).transpose(1, 2)
    key, value = (
        scratch.gather(name, cache, group.blocks, cache.dtype)
        .view(group.num_pieces, -1, *cache.shape[2:])
        .transpose(1, 2)
        for name, cache in (("keys", keys), ("values", values))
    )
    if softcap is not None or sinks is not None:
        result = _explicit(query, key, value, group.mask, scale, softcap, sinks)
    else:
        if group.mask is None:
            key, value = key[:, :, : group.max_queries], value[:, :, : group.max_queries]
        result = scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=True
        )
    rows = result.transpose(1, 2).reshape(-1, num_heads, head_dim)
    out.index_copy_(0, group.out_tokens, rows.index_select(0, group.out_cells))


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with the scores written out in fp32, for what the fused function has no argument for."""
    num_pieces, num_heads, num_queries, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # Query heads of one KV head side by side: [n, num_kv_heads, heads per KV head * queries, head_dim]
    grouped = query.reshape(num_pieces, num_kv_heads, -1, head_dim).float()
    scores = (grouped @ key.float().transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(num_pieces, num_heads, num_queries, -1)
    if mask is not None:
        scores += mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(1, num_heads, 1, 1).expand(num_pieces, num_heads, num_queries, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    result = weights.reshape(num_pieces, num_kv_heads, -1, key.shape[2]) @ value.float()
    return result.view(num_pieces, num_heads, num_queries, head_dim).to(query.dtype)
