"""Causal attention of several queries per request on Hopper, as fast as whole prompts side by side, but paged.

    a program stays and takes items (128 rows: queries x the query heads of a KV head) as long as there are any

    warps 8..11   one of them fetches: an item's queries, then tiles of keys and values through the block table, the
                  last tile first, as far ahead as shared memory has room; the end of one item overlaps the next
    warps 0..3    rows 0..63    | Q K^T of the next tile | softmax of it, while P V of this one is multiplied |
    warps 4..7    rows 64..127  |    its softmax         | Q K^T ...        the halves take turns
    shared        queries 32 KiB | keys: stages x 44 KiB | values: stages x 44 KiB            (tiles of 176 tokens)

A block of 16 tokens is three fetches of the tensor memory accelerator: two halves of its keys, as the operand of Q K^T
lies, and its values. Items are those of the Triton kernel (`prefill.py`), which takes everything else: windows, soft
caps, sinks, other heads, other types, and layers between which other layers lie.

Of few items behind long contexts several programs do one, each a part of its keys; the last to end merges them.

The schedule is FlashAttention-3's (Shah et al., 2024): a producer and two consumers, ping-pong, and the softmax of a
tile beside the products of the one before.
"""

from __future__ import annotations

import ctypes
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.prefill_plan import CELLS_PER_PROGRAM, Programs
from kvarena.engine.kernels.hopper import HopperKernels, Kernel

ROWS, _HEAD_DIM, _THREADS = 128, 128, 384
_MOST_GROUP = 16
# Of a part, by thread: 64 sums, and of two rows the largest score and the weights' sum.
_CELL = 256 * (64 + 4)
_LOG2_E = 1.4426950408889634


class PrefillTile(NamedTuple):
    """How the kernel runs.

    Attributes:
        tokens: of a step, a multiple of 16.
        stages: tiles of keys, and of values, fetched ahead.
        turns: the halves of a program take the tensor cores by turns.
    """

    tokens: int = 176
    stages: int = 2
    turns: bool = True

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program."""
        return 1024 + 2 * _HEAD_DIM * (ROWS + 2 * self.stages * self.tokens)


# The best of `kvarena benchmark kernels --only chunks --tune` on an H200: 176 tokens by 1 to 5 % before 128, level with
# 160, and turns by 1 % before none.
TILE = PrefillTile()


def fits(head_dim: int, group: int, block_size: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernel takes a pool of such blocks, with `group` query heads to a KV head."""
    return head_dim == _HEAD_DIM and 1 <= group <= _MOST_GROUP and block_size % 16 == 0 and dtype == torch.bfloat16


def box_tokens(tile: PrefillTile, block_size: int, *, contiguous: bool) -> int:
    """Tokens of a fetch, which must lie side by side: a divisor of the tile, and of a block if there are blocks."""
    return tile.tokens if contiguous else gcd(tile.tokens, block_size)


def launch_constants(tile: PrefillTile, group: int, block_size: int, *, contiguous: bool) -> dict[str, int]:
    """The kernel's constants."""
    return {
        "GROUP": group, "BLOCK_SIZE": block_size, "CONTIGUOUS": int(contiguous), "TILE": tile.tokens,
        "BOX": box_tokens(tile, block_size, contiguous=contiguous), "STAGES": tile.stages, "TURNS": int(tile.turns),
        "COLUMNS": _HEAD_DIM,
    }  # fmt: skip


class WidePrefill:
    """Launches the kernel.

    Args:
        kernels: of the device where the pool is.
        tile: how it runs.
    """

    def __init__(self, kernels: HopperKernels, tile: PrefillTile = TILE) -> None:
        self._kernels = kernels
        self._tile = tile
        self._compiled: dict[tuple[int, int, bool], Kernel] = {}
        num_cells = CELLS_PER_PROGRAM * kernels.num_multiprocessors
        self._partial = torch.empty(num_cells, _CELL, dtype=torch.float32, device=kernels.device)
        # Items taken, programs that are done, parts of each item that are done: zeros between launches, which follow
        # each other.
        self._counters = torch.zeros(2 + num_cells, dtype=torch.int32, device=kernels.device)

    def programs(self, num_kv_heads: int) -> Programs:
        """What shares a step's items."""
        return Programs(self._kernels.num_multiprocessors, num_kv_heads)

    def takes(self, call: AttentionCall) -> bool:
        """Whether it can do this layer: plain attention over a pool whose layers are contiguous."""
        q, out = call.q, call.out
        plain = call.sliding_window is None and call.softcap is None and call.sinks is None
        shape = fits(q.shape[2], call.group, call.block_size, call.keys.dtype) and q.dtype == torch.bfloat16
        # The tensor memory accelerator reads queries, and results are written, 16 bytes at a time.
        wide = q.stride(2) == 1 and not (q.data_ptr() % 16 or q.stride(0) % 8 or q.stride(1) % 8)
        return plain and shape and wide and out.is_contiguous() and _is_pool(call.keys) and _is_pool(call.values)

    def __call__(self, call: AttentionCall, *, items: Tensor, num_items: int, overlap: bool = True) -> None:
        """Causal attention of the queries that `items` name over their contexts.

        Args:
            call: what is read and written, which `takes` agreed to.
            items: int32 [PREFILL_FIELDS * num_items], see `kvarena.engine.kernels.attention.prefill_plan`; blocks of
                128 // group queries, cut for `programs`.
            num_items: how many there is room for; those without a row, -1, come last.
            overlap: launch it while the kernel before it runs; the items and the block table must have been complete
                when that one began.
        """
        kernel, box = self._kernel(call.group, call.block_size, contiguous=call.contiguous)
        heads, kernels = call.num_kv_heads, self._kernels
        q_map = kernels.box_map(call.q, (64, call.group, ROWS // call.group))
        kernels.launch(
            kernel, min(heads * num_items, kernels.num_multiprocessors), q_map,
            kernels.head_map(call.keys, box, halves=1), kernels.head_map(call.values, box),
            *(ctypes.c_void_p(x.data_ptr()) for x in (
                call.out, items, call.query_start_loc, call.seq_lens, call.block_table, self._counters,
                self._partial,
            )),
            *map(ctypes.c_int, (
                num_items, heads, call.keys.shape[0], call.out.stride(0), call.out.stride(1),
                call.block_table.stride(0),
            )),
            ctypes.c_float(call.scale * _LOG2_E), overlap=overlap,
        )  # fmt: skip

    def _kernel(self, group: int, block_size: int, *, contiguous: bool) -> tuple[Kernel, int]:
        """The kernel, and the tokens of its fetches."""
        key = (group, block_size, contiguous)
        constants = launch_constants(self._tile, group, block_size, contiguous=contiguous)
        if key not in self._compiled:
            self._compiled[key] = self._kernels.compile(
                "wide_prefill", constants, self._tile.tokens, threads=_THREADS, shared_bytes=self._tile.shared_bytes
            )
        return self._compiled[key], constants["BOX"]


def _is_pool(part: Tensor) -> bool:
    return part.is_contiguous() and part.data_ptr() % 16 == 0
