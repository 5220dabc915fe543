"""What a launch of attention reads and writes, for the decode and the prefill kernel alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.attention.config import DecodeConfig, PrefillConfig, SharedConfig
from kvarena.engine.kernels.common import next_power_of_2, slot_type


class AttentionCall(NamedTuple):
    """One layer's attention over a step.

    Attributes:
        q, out: [T, num_heads, head_dim], a head's elements side by side; `out` is written.
        keys, values: a layer of the pool by slot, [num_slots, num_kv_heads, head_dim].
        query_start_loc, seq_lens, block_table: see `AttentionMetadata`.
        block_size: slots per block.
        scale, sliding_window, softcap, sinks: see `AttentionBackend.attend`; the scale is positive.
        contiguous: every block table is a run of consecutive ids; only its first entry is read.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    block_size: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    contiguous: bool = False

    @property
    def num_kv_heads(self) -> int:
        """Of the pool."""
        return self.keys.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def dim_pad(self) -> int:
        """A head's elements in a tile."""
        return max(16, next_power_of_2(self.q.shape[2]))

    def arguments(
        self, items: Tensor, num_items: int, config: DecodeConfig | PrefillConfig | SharedConfig
    ) -> dict[str, Any]:
        """The arguments that all kernels have, by name.

        Args:
            items: int32, see `kvarena.engine.kernels.attention.plan`.
            num_items: how many there is room for.
            config: tile, warps and stages.
        """
        q, keys, out = self.q, self.keys, self.out
        return {
            "q_ptr": q, "k_ptr": keys, "v_ptr": self.values, "out_ptr": out, "items_ptr": items,
            "query_loc_ptr": self.query_start_loc, "seq_lens_ptr": self.seq_lens, "table_ptr": self.block_table,
            "sinks_ptr": q if self.sinks is None else self.sinks, "capacity": num_items, "scale": self.scale,
            "softcap": 0.0 if self.softcap is None else self.softcap,
            "stride_q_row": q.stride(0), "stride_q_head": q.stride(1),
            "stride_out_row": out.stride(0), "stride_out_head": out.stride(1),
            "stride_head": keys.stride(1), "stride_table": self.block_table.stride(0),
            "GROUP": self.group, "HEAD_DIM": q.shape[2], "DIM_PAD": self.dim_pad, "SLOT": slot_type(keys),
            "STRIDE_SLOT": keys.stride(0), "BLOCK_SIZE": self.block_size, "TILE": config.tile,
            "WINDOW": self.sliding_window or 0, "SOFTCAP": self.softcap is not None, "SINKS": self.sinks is not None,
            "CONTIGUOUS": self.contiguous, "UPCAST": INTERPRET, "STAGES": config.num_stages,
            "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers,
        }  # fmt: skip
