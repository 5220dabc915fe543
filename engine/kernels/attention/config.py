"""Tile shapes, warps and pipeline stages of the attention kernels, by head size and element size.

Chosen for Hopper: a decode tile's keys and values are 16 KiB each, so that two tiles in flight times three programs
fill a multiprocessor's 227 KiB of shared memory and cover the latency of its device memory.
"""

from __future__ import annotations

from typing import NamedTuple

from kvarena.engine.kernels.common import next_power_of_2


class DecodeConfig(NamedTuple):
    """How the decode kernel runs.

    Attributes:
        tile: tokens per step of the inner loop; a power of two.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
        programs_per_sm: programs that a multiprocessor should get; contexts are split until it does.
        min_chunk: fewest tokens of a part.
        max_registers: per thread; None: as the compiler likes, which may spill some for a fourth program that finds no
            shared memory.
    """

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_chunk: int
    max_registers: int | None = None


class PrefillConfig(NamedTuple):
    """How the prefill kernel runs.

    Attributes:
        rows: rows of the score matrix per program: queries times the query heads of a KV head.
        tile: tokens per step of the inner loop.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
        max_registers: per thread; None: as many as the compiler likes. 128 let two programs of 8 warps share a
            multiprocessor: one's softmax then runs beside the other's products.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class SharedConfig(NamedTuple):
    """How the decode kernel of requests with common blocks runs.

    Attributes:
        tile: tokens per step of the inner loop, of items of many rows.
        narrow_tile: the same, of items with at most 16 query heads.
        middle, wide: rows of the score matrix, query heads of all requests, of items of some and of many rows; equal:
            there is one size.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
        programs_per_sm: programs that stay on a multiprocessor.
        lag: part of the items of many rows that come before the first of single rows, by tokens: these end their rows,
            and merge.
        queue: programs take the next item of a queue, which costs each item an exchange with the L2 cache; else every
            so-manieth, whatever these take.
        max_registers: per thread; None: as the compiler likes.
    """

    tile: int
    narrow_tile: int
    middle: int
    wide: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    lag: float = 0.25
    queue: bool = True
    max_registers: int | None = None

    def most_rows(self, group: int) -> int:
        """Rows of an item at most, with `group` query heads to a KV head."""
        return max(1, max(self.middle, self.wide) // group)


# Batches of at most so many rows; larger ones fill the card by themselves.
FEW_ROWS, SOME_ROWS, MANY_ROWS = 8, 16, 64


def decode_config(head_dim: int, element_size: int, num_rows: int) -> DecodeConfig:
    """The decode kernel's shape for a head size, the pool's element size in bytes, and a batch's rows.

    Few rows are cut into as many parts as there are multiprocessors, and no more: the merge reads all parts of a row.
    Some tens of rows leave one or two programs to a multiprocessor, which need more bytes in flight each.
    """
    row_bytes = max(16, next_power_of_2(head_dim)) * element_size
    tile = min(128, max(16, 16384 // row_bytes))
    if element_size <= 2 and num_rows <= SOME_ROWS:
        few = DecodeConfig(tile, num_warps=2, num_stages=3, programs_per_sm=1, min_chunk=tile)
        return few if num_rows <= FEW_ROWS else few._replace(num_warps=4, max_registers=168)
    if element_size <= 2 and num_rows <= MANY_ROWS:
        wide = min(128, 2 * tile)
        return DecodeConfig(wide, num_warps=4, num_stages=2, programs_per_sm=2, min_chunk=max(128, wide))
    return DecodeConfig(tile, num_warps=4, num_stages=3, programs_per_sm=2, min_chunk=max(128, tile), max_registers=168)


# Where the CUDA kernel decodes from some rows on (`stream_decode.FEWEST_ROWS`), the Triton kernel is faster again from
# so many rows on, by a word of the card's name; a card that is not here: never.
# H200 (copy 4.24 TB/s, 2026-12-01, commit 1eecd0c, 8B heads, blocks of 16; `kvarena benchmark kernels --only rows`),
# us, CUDA / Triton: 32 x 1,024 32.8 / 35.0, 64 x 1,024 67.2 / 65.8, 256 x 1,024 258 / 242; 32 x 8,192 255 / 244, 64 x
# 8,192 510 / 473, 256 x 8,192 2,016 / 1,863. Between 32 and 64 rows contexts decide: they stay with the CUDA kernel. So
# does the H100, where it was faster.
TRITON_FROM = {"H200": 64}


def triton_from(card: str) -> int | None:
    """Rows from which on the Triton kernel decodes faster than the CUDA kernel on `card`; None: never."""
    return next((rows for name, rows in TRITON_FROM.items() if name in card), None)


def shared_config(head_dim: int, element_size: int, group: int) -> SharedConfig:
    """The shape of the decode kernel of requests with common blocks, by head size, the pool's element size in bytes
    and the query heads per KV head.

    By layouts and registers of the compiled kernel; no device has timed it yet (`kvarena benchmark shared_reads
    --sections kernel --tune` does).
    """
    least = max(16, next_power_of_2(group))
    if element_size > 2:
        rows, tile = (max(32, least), 32) if head_dim <= 128 else (least, 16)
        return SharedConfig(tile, tile, rows, rows, num_warps=4, num_stages=2, programs_per_sm=2)
    if max(16, next_power_of_2(head_dim)) > 128:
        # Half as many rows, or they spill; so they do if the compiler is not told that they may have so many registers.
        rows = max(32, least)
        return SharedConfig(32, 32, rows, rows, num_warps=4, num_stages=2, programs_per_sm=2, max_registers=255)
    rows = max(64, least)
    return SharedConfig(64, 64, rows, rows, num_warps=4, num_stages=2, programs_per_sm=2)


def prefill_config(head_dim: int, element_size: int, group: int) -> PrefillConfig:
    """The prefill kernel's shape for a head size, the pool's element size in bytes and the query heads per KV head."""
    if element_size > 2:
        # float32 products run on the plain units: small tiles, or registers spill.
        return PrefillConfig(rows=max(32, next_power_of_2(group)), tile=32, num_warps=4, num_stages=2)
    dim_pad = max(16, next_power_of_2(head_dim))
    rows = max(128, next_power_of_2(group))
    # Above 128 elements per head the accumulators fill the registers: smaller tiles, or they spill.
    return PrefillConfig(rows, tile=64 if dim_pad <= 128 else 32, num_warps=8, num_stages=3 if dim_pad <= 128 else 2)
