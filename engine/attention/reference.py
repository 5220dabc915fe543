"""The reference backend: plain torch, on any device, vectorised over requests.

Two kinds of query rows. Rows of one new token read their context in tiles (`decode_tiles`); rows of several, and
the former when their contexts are short, are padded into a few rectangles for `scaled_dot_product_attention`
(`prefill_groups`). Indices and masks are made once per step and window; a layer gathers and multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.attention.decode_tiles import DecodeTiles, attend_tiles, plan_tiles
from kvarena.engine.attention.prefill_groups import PrefillGroup, attend_group, plan_groups
from kvarena.engine.attention.scratch import Scratch
from kvarena.engine.pool.kv_pool import KVPool

# One-token rows with fewer tokens of context in all are grouped: tiles take more calls, which then show.
FEW_TOKENS = 1024


@dataclass(slots=True)
class _Prepared:
    """A step's split of the batch rows, and the plans made so far.

    Attributes:
        tile_rows: rows of one new token, unless their contexts are short.
        group_rows: the others.
        tile_tokens: flat indices of the tile rows' tokens; None when there are no others.
        block_table: host copy of the block table; of its first column alone when the backend is contiguous.
        tiles: their plan, by window.
        groups: the others' plan, by window and whether scores are computed explicitly.
    """

    tile_rows: np.ndarray
    group_rows: np.ndarray
    tile_tokens: Tensor | None
    block_table: np.ndarray
    tiles: dict[int | None, DecodeTiles] = field(default_factory=dict)
    groups: dict[tuple[int | None, bool], list[PrefillGroup]] = field(default_factory=dict)


class ReferenceBackend:
    """Attention over `pool` in plain torch. Scores and sums are in fp32, whatever the pool's dtype.

    Args:
        pool: where keys and values live.
        contiguous: the allocator hands out consecutive blocks only: a context is addressed by the start of its region,
            and of the block table the first entry alone is read.
    """

    def __init__(self, pool: KVPool, *, contiguous: bool = False) -> None:
        self.pool = pool
        self.contiguous = contiguous
        self._scratch = Scratch()

    def prepare(self, meta: AttentionMetadata) -> None:
        """Split the batch into tile rows and group rows."""
        query_lens = np.diff(meta.host_query_start_loc)
        is_tiled = query_lens == 1
        if meta.host_seq_lens[is_tiled].sum() < FEW_TOKENS:
            is_tiled[:] = False
        tile_rows = np.flatnonzero(is_tiled)
        tokens = None
        if len(tile_rows) < len(query_lens):
            tokens = torch.from_numpy(meta.host_query_start_loc[tile_rows].astype(np.int64)).to(meta.seq_lens.device)
        meta.prepared = _Prepared(
            tile_rows=tile_rows,
            group_rows=np.flatnonzero(~is_tiled),
            tile_tokens=tokens,
            block_table=(meta.block_table[:, :1] if self.contiguous else meta.block_table).numpy(force=True),
        )

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Store the new tokens' keys and values."""
        keys, values = self.pool.slots(layer)
        keys.index_copy_(0, meta.slot_mapping, k)
        values.index_copy_(0, meta.slot_mapping, v)

    def attend(
        self,
        q: Tensor,
        layer: int,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        prepared: _Prepared = meta.prepared
        keys, values = self.pool.blocks(layer)
        # A window that reaches over every context hides nothing: the plan without one serves.
        window = sliding_window if sliding_window is not None and sliding_window < meta.max_seq_len else None
        decoded = None
        if len(prepared.tile_rows):
            tiles = self._tiles(meta, window)
            rows = q if prepared.tile_tokens is None else q.index_select(0, prepared.tile_tokens)
            decoded = attend_tiles(rows, keys, values, tiles, self._scratch, scale, softcap, sinks)
            if prepared.tile_tokens is None:
                return decoded
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Padding is nobody's. Left as memory was, a NaN would come by the null block to keys that others mask: 0 x NaN.
        out[int(meta.host_query_start_loc[-1]) :].zero_()
        if decoded is not None and prepared.tile_tokens is not None:
            out.index_copy_(0, prepared.tile_tokens, decoded)
        for group in self._groups(meta, window, explicit=softcap is not None or sinks is not None):
            attend_group(q, out, keys, values, group, self._scratch, scale, softcap, sinks)
        return out

    def _tiles(self, meta: AttentionMetadata, window: int | None) -> DecodeTiles:
        prepared: _Prepared = meta.prepared
        if window not in prepared.tiles:
            rows = prepared.tile_rows
            prepared.tiles[window] = plan_tiles(
                prepared.block_table[rows],
                meta.host_seq_lens[rows],
                meta.block_size,
                window,
                self.pool.num_kv_heads * self.pool.head_dim * torch.float32.itemsize,
                meta.seq_lens.device,
                contiguous=self.contiguous,
            )
        return prepared.tiles[window]

    def _groups(self, meta: AttentionMetadata, window: int | None, *, explicit: bool) -> list[PrefillGroup]:
        prepared: _Prepared = meta.prepared
        if (window, explicit) not in prepared.groups:
            prepared.groups[window, explicit] = plan_groups(
                prepared.group_rows,
                meta.host_query_start_loc,
                meta.host_seq_lens,
                prepared.block_table,
                meta.block_size,
                window,
                explicit,
                self.pool.dtype,
                meta.seq_lens.device,
                contiguous=self.contiguous,
            )
        return prepared.groups[window, explicit]
