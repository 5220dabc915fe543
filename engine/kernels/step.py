"""What a step's inputs need on the device, so that the host sends a few integers per token and request.

Each request has a row for as long as it lives: its block table and its last sampled token stay on the device. A step
sends, in batch order, the token where the device does not have it (else -1), the position and the row:

    sent      tokens [cap] | positions [cap] | rows [cap]
    device    tables [num_rows, width],  last_tokens [num_rows]
       -> ids, positions, slots; of a decode step also context lengths and block tables, in batch order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


class StepBuffers:
    """A step's inputs at fixed addresses, for up to T tokens of R requests.

    Attributes:
        ids, positions, slots: int64 [T].
        logits_indices: int64 [R].
        seq_lens: int32 [R].
        block_table: int32 [R, width].
    """

    def __init__(self, num_tokens: int, num_rows: int, width: int, device: torch.device) -> None:
        # Each by itself: parts of one tensor would not all be aligned for wide loads.
        self.ids, self.positions, self.slots = (
            torch.zeros(num_tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.logits_indices = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.seq_lens = torch.ones(num_rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(num_rows, width, dtype=torch.int32, device=device)


def scatter_words(flat: Tensor, pairs: Tensor) -> None:
    """flat[pairs[0]] = pairs[1].

    Args:
        flat: int32 [n], written.
        pairs: int32 [2, k] on the same device; indices differ from one another.
    """
    count = pairs.shape[1]
    if flat.is_cuda:
        scatter_kernel[(triton.cdiv(count, 256),)](flat, pairs, count, pairs.stride(0), BLOCK=256)
    else:
        flat[pairs[0].long()] = pairs[1]


def expand_decode(
    sent: Tensor, last_tokens: Tensor, tables: Tensor, out: StepBuffers, count: int, block_size: int
) -> None:
    """Fill the first `count` entries of `out`.

    Args:
        sent: int32 [>= 3, >= count]: tokens, positions, rows; see the module.
        last_tokens: int64 [num_rows].
        tables: int32 [num_rows, width].
        out: written; a block table only as far as the request's context.
        count: entries.
        block_size: slots per block.
    """
    if sent.is_cuda:
        expand_kernel[(count,)](
            sent, last_tokens, tables, out.ids, out.positions, out.slots, out.seq_lens, out.block_table,
            sent.stride(0), tables.stride(0), out.block_table.stride(0), BLOCK_SIZE=block_size, CHUNK=512,
            num_warps=2,
        )  # fmt: skip
        return
    tokens, positions, rows = sent[:3, :count].long().unbind()
    out.ids[:count] = torch.where(tokens < 0, last_tokens[rows], tokens)
    out.positions[:count] = positions
    out.seq_lens[:count] = positions + 1
    out.slots[:count] = tables[rows, positions // block_size].long() * block_size + positions % block_size
    out.block_table[:count] = tables[rows]


def expand_tokens(
    fields: Tensor, last_tokens: Tensor, tables: Tensor, out: StepBuffers, count: int, block_size: int
) -> None:
    """Fill the first `count` of `out`'s ids, positions and slots, in a step whose requests have any number of tokens.

    Args:
        fields: int32 [3, count]: tokens, positions, rows; see the module.
        last_tokens: int64 [num_rows].
        tables: int32 [num_rows, width].
        out: written.
        count: tokens.
        block_size: slots per block.
    """
    if fields.is_cuda:
        expand_tokens_kernel[(triton.cdiv(count, 128),)](
            fields, last_tokens, tables, out.ids, out.positions, out.slots, count, fields.stride(0), tables.stride(0),
            BLOCK_SIZE=block_size, BLOCK=128, num_warps=4,
        )  # fmt: skip
        return
    tokens, at, rows = fields.long().unbind()
    out.ids[:count] = torch.where(tokens < 0, last_tokens[rows], tokens)
    out.positions[:count] = at
    out.slots[:count] = tables[rows, at // block_size].long() * block_size + at % block_size


@triton.jit(do_not_specialize=["count", "stride"])
def scatter_kernel(flat_ptr, pairs_ptr, count, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """flat[pairs[0]] = pairs[1], BLOCK pairs a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < count
    index = tl.load(pairs_ptr + i, mask=keep, other=0)
    tl.store(flat_ptr + index, tl.load(pairs_ptr + stride + i, mask=keep, other=0), mask=keep)


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    sent_ptr, last_ptr, tables_ptr, ids_ptr, positions_ptr, slots_ptr, lens_ptr, out_table_ptr,
    stride_sent, stride_table, stride_out, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One request of a decode step; see the module."""
    i = tl.program_id(0)
    token = tl.load(sent_ptr + i).to(tl.int64)
    position = tl.load(sent_ptr + stride_sent + i)
    row = tl.load(sent_ptr + 2 * stride_sent + i).to(tl.int64)
    if token < 0:
        token = tl.load(last_ptr + row)
    table = tables_ptr + row * stride_table
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.store(ids_ptr + i, token)
    tl.store(positions_ptr + i, position.to(tl.int64))
    tl.store(slots_ptr + i, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(lens_ptr + i, position + 1)
    num_blocks = position // BLOCK_SIZE + 1
    for start in range(0, num_blocks, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        keep = columns < num_blocks
        blocks = tl.load(table + columns, mask=keep)
        tl.store(out_table_ptr + i.to(tl.int64) * stride_out + columns, blocks, mask=keep)


@triton.jit(do_not_specialize=["count"])
def expand_tokens_kernel(  # type: ignore[no-untyped-def]
    fields_ptr, last_ptr, tables_ptr, ids_ptr, positions_ptr, slots_ptr, count, stride_fields, stride_table,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of a step; see `expand_tokens`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < count
    token = tl.load(fields_ptr + i, mask=keep, other=0).to(tl.int64)
    position = tl.load(fields_ptr + stride_fields + i, mask=keep, other=0)
    row = tl.load(fields_ptr + 2 * stride_fields + i, mask=keep, other=0).to(tl.int64)
    last = tl.load(last_ptr + row, mask=keep & (token < 0), other=0)
    block = tl.load(tables_ptr + row * stride_table + position // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
    tl.store(ids_ptr + i, tl.where(token < 0, last, token), mask=keep)
    tl.store(positions_ptr + i, position.to(tl.int64), mask=keep)
    tl.store(slots_ptr + i, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=keep)
