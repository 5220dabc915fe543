"""A sum over ranks of one host in one launch, with what comes behind it: residual addition and RMS norm.

Each rank stores its part where the others can read it, says so, waits until all have said so, and reads all parts:

    rank 0   x0 -> buffer 0 | flag to 1 | flag of 1 | x0 + x1 + residual -> residual, norm -> out
    rank 1   x1 -> buffer 1 | flag to 0 | flag of 0 | x0 + x1 + residual -> residual, norm -> out

A row is a program's, on every rank the same one's, with flags of its own. Flags are the number of the call, which the
device counts, so that a CUDA graph may be replayed; buffers are two, used in turn: whoever writes one for the second
time knows by the flags between that all have read it. Parts are added in the order of the ranks, so all get the same
bits. One-shot all-reduce as in TensorRT-LLM and vLLM's custom_all_reduce; peer reads alone, no multicast.

Nobody waits for ever: who has looked `MOST_POLLS` times for a flag goes on with NaN, so no token comes of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2

# A look takes half a microsecond or more: two minutes at least, for a rank that still compiles.
MOST_POLLS = 1 << 28
_FLAG_BYTES = 4


class PeerMemory(NamedTuple):
    """Memory that every rank can read, as one rank sees it.

    Attributes:
        buffers: int64 [ranks], the address of each rank's buffer, a multiple of 16: 2 * `num_rows` rows.
        flags: int64 [ranks], the address of each rank's flags: int32 [num_rows, ranks], zeros before the first call.
        calls: int32 [num_rows], of this rank alone: zeros before the first call. They wrap around, as flags do.
        rank: this one.
        num_rows: most rows of a call.
        size: elements of a row.
        dtype: of them.
    """

    buffers: Tensor
    flags: Tensor
    calls: Tensor
    rank: int
    num_rows: int
    size: int
    dtype: torch.dtype

    @staticmethod
    def num_bytes(num_ranks: int, num_rows: int, size: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of a rank's buffer, and of its flags behind it."""
        return 2 * num_rows * size * dtype.itemsize, num_rows * num_ranks * _FLAG_BYTES


@triton.jit
def _addresses(pointers, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every rank's address, [ranks and some more]: read once, before anybody waits."""
    ranks = tl.arange(0, triton.next_power_of_2(RANKS))
    return tl.load(pointers + ranks, mask=ranks < RANKS, other=0)


@triton.jit
def _address(addresses, rank, like):  # type: ignore[no-untyped-def]
    """One rank's, of what `like` points to. It is aligned: so that many bytes are read and written at once."""
    ranks = tl.arange(0, addresses.shape[0])
    return tl.multiple_of(tl.sum(tl.where(ranks == rank, addresses, 0), 0).to(like.dtype), 16)


@triton.jit
def _publish(flags, calls_ptr, row, call, RANKS: tl.constexpr, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the other ranks that this one's row is there."""
    # All of the program's stores come before its flags.
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            flag = _address(flags, peer, calls_ptr) + row * RANKS + RANK
            tl.atomic_xchg(flag, call, sem="release", scope="sys")


@triton.jit
def _await(flags, calls_ptr, row, call, polls, RANKS: tl.constexpr, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the other ranks have told this one; how many polls are left, 0 where that was not enough."""
    mine = _address(flags, RANK, calls_ptr) + row * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            # By their difference: both wrap around after some hours.
            # What is found is handed to all threads behind a barrier, so none of them reads before.
            while (tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - call < 0) & (polls > 0):
                polls -= 1
    return polls


@triton.jit
def all_reduce_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, out_ptr, buffers_ptr, flags_ptr, calls_ptr, epsilon, stride_x, stride_residual,
    stride_out, num_slots, polls, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, PUBLISH: tl.constexpr, REDUCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row; see `all_reduce`."""
    row = tl.program_id(0)
    at = tl.arange(0, SIZE_PAD)
    exists = at < SIZE
    buffers, flags = _addresses(buffers_ptr, RANKS), _addresses(flags_ptr, RANKS)
    if NORM:
        weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    call = tl.load(calls_ptr + row) + 1
    place = ((call & 1) * num_slots + row).to(tl.int64) * SIZE
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + at, mask=exists, other=0.0)
    if PUBLISH:
        tl.store(_address(buffers, RANK, x_ptr) + place + at, x, mask=exists)
        _publish(flags, calls_ptr, row, call, RANKS, RANK)
    if REDUCE:
        residual = residual_ptr + row.to(tl.int64) * stride_residual + at
        if ADD:
            before = tl.load(residual, mask=exists, other=0.0).to(tl.float32)
        left = _await(flags, calls_ptr, row, call, polls, RANKS, RANK)
        total = tl.zeros([SIZE_PAD], tl.float32)
        for peer in tl.static_range(RANKS):
            if peer == RANK:
                total += x.to(tl.float32)
            else:
                part = _address(buffers, peer, x_ptr) + place + at
                # Not from this rank's first cache, which does not see what others write.
                total += tl.load(part, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
        total = tl.where(left > 0, total, float("nan"))
        if ADD:
            rounded = (total + before).to(residual_ptr.dtype.element_ty)
            tl.store(residual, rounded, mask=exists)
            total = rounded.to(tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(total * total, 0) / SIZE + epsilon)
            total = (total * factor).to(out_ptr.dtype.element_ty).to(tl.float32) * weight
        if NORM or not ADD:
            out = out_ptr + row.to(tl.int64) * stride_out + at
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=exists)
        tl.store(calls_ptr + row, call)


def all_reduce(
    x: Tensor,
    memory: PeerMemory,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    epsilon: float = 0.0,
    out: Tensor | None = None,
    polls: int = MOST_POLLS,
    parts: tuple[bool, bool] = (True, True),
) -> Tensor:
    """The sum of every rank's `x`; all ranks call it, with as many rows, in the same order.

    Args:
        x: [T, size], this rank's part; at most `memory.num_rows` rows.
        memory: of this rank.
        residual: [T, size]; becomes residual + sum, in place.
        weight: [size] of an RMS norm of the residual; None: no norm.
        epsilon: of the norm.
        out: [T, size] to write into: the sum, or the norm; may be `x`. Not written with a residual and no norm.
        polls: looks for the other ranks' flags before a row is given up: it is NaN then.
        parts: whether to publish `x`, and to add up. Both at once, but where one process stands for all ranks.

    Returns:
        `out`, or the residual where there is one and no norm.
    """
    num_rows, size = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    padded = next_power_of_2(size)
    if num_rows:
        all_reduce_kernel[(num_rows,)](
            x, x if residual is None else residual, x if weight is None else weight, out, memory.buffers, memory.flags,
            memory.calls, epsilon, x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
            memory.num_rows, polls, SIZE=size, SIZE_PAD=padded, RANKS=len(memory.buffers), RANK=memory.rank,
            ADD=residual is not None, NORM=weight is not None, PUBLISH=parts[0], REDUCE=parts[1],
            num_warps=min(16, max(1, padded // 512)), **launch_options(),
        )  # fmt: skip
    return out if residual is None or weight is not None else residual


@triton.jit
def best_token_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, tokens_ptr, params_ptr, last_ptr, out_ptr, buffers_ptr, flags_ptr, calls_ptr, num_slots, polls,
    RANKS: tl.constexpr, RANK: tl.constexpr, PUBLISH: tl.constexpr, REDUCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row; see `best_token`."""
    row = tl.program_id(0)
    buffers, flags = _addresses(buffers_ptr, RANKS), _addresses(flags_ptr, RANKS)
    await_previous(OVERLAP)
    call = tl.load(calls_ptr + row) + 1
    place = ((call & 1) * num_slots + row) * 2
    own_score = tl.load(scores_ptr + row)
    # Exact: no vocabulary reaches 2^24; what stands for no token is far above.
    own_token = tl.load(tokens_ptr + row).to(tl.float32)
    last = last_ptr + tl.load(params_ptr + row)
    if PUBLISH:
        own = _address(buffers, RANK, scores_ptr) + place
        tl.store(own, own_score)
        tl.store(own + 1, own_token)
        _publish(flags, calls_ptr, row, call, RANKS, RANK)
    if REDUCE:
        left = _await(flags, calls_ptr, row, call, polls, RANKS, RANK)
        best = float("-inf")
        token = 2147483648.0
        for peer in tl.static_range(RANKS):
            if peer == RANK:
                score, its_token = own_score, own_token
            else:
                part = _address(buffers, peer, scores_ptr) + place
                score = tl.load(part, cache_modifier=".cg")
                its_token = tl.load(part + 1, cache_modifier=".cg")
            # Of equals the lower rank has the lower token.
            better = score > best
            token = tl.where(better, its_token, token)
            best = tl.where(better, score, best)
        found = (token < 16777216.0) & (left > 0)
        tl.store(out_ptr + row, tl.where(found, token, -1.0).to(tl.int64))
        tl.store(last, tl.where(found, token, 0.0).to(tl.int64))
        tl.store(calls_ptr + row, call)


def best_token(
    scores: Tensor,
    tokens: Tensor,
    params: Tensor,
    last_tokens: Tensor,
    memory: PeerMemory,
    *,
    parts: tuple[bool, bool] = (True, True),
) -> Tensor:
    """The token of every rank's best score, in one launch; all ranks call it as they call `all_reduce`.

    Args:
        scores, tokens: of this rank's columns, [N] each (`kvarena.engine.kernels.sample.draw_parts`).
        params, last_tokens: as of `draw_tokens`; the latter is written.
        memory: of this rank, with rows of two float32.
        parts: see `all_reduce`.

    Returns:
        int64 [N], -1 where no token could be picked.
    """
    out = torch.empty_like(tokens)
    if len(tokens):
        best_token_kernel[(len(tokens),)](
            scores, tokens, params, last_tokens, out, memory.buffers, memory.flags, memory.calls, memory.num_rows,
            MOST_POLLS, RANKS=len(memory.buffers), RANK=memory.rank, PUBLISH=parts[0], REDUCE=parts[1], num_warps=1,
            **launch_options(),
        )  # fmt: skip
    return out
