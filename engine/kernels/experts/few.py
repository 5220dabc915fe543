"""Routing of few tokens by one program; and what comes before it, norm and router, in the same launch.

stream [T, H] -> norm -> x [T, H]           every program for itself: a token's row is a few kilobytes
                  x @ router.T -> logits    each program some experts, whose weights it has before the stream is there
                                            the last program to come routes: softmax, the best, their sort
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2

# Of the router's, that a program holds.
_WEIGHTS = 8192


class RouterSource(NamedTuple):
    """What the logits of a router are made of.

    Attributes:
        stream: [T, H], rows contiguous.
        norm: [H], weight of an RMS norm of the stream with `eps`.
        eps: see `norm`.
        router: [E, H], contiguous, or with a row more.
        x: [T, H], contiguous: the normed stream; written.
        lock: int32 [1], 0 before and after a launch.
    """

    stream: Tensor
    norm: Tensor
    eps: float
    router: Tensor
    x: Tensor
    lock: Tensor

    def launch(self, num_logits: int, given: tuple[Any, ...], shape: Mapping[str, Any]) -> None:
        """Norm, router and routing; `given` and `shape` are the routing's, see `route_all`."""
        size = self.stream.shape[1]
        padded = next_power_of_2(size)
        block = min(next_power_of_2(num_logits), max(1, _WEIGHTS // padded))
        norm_route_kernel[(triton.cdiv(num_logits, block),)](
            self.stream, self.norm, self.router, self.x, self.lock, self.stream.stride(0), self.eps, *given,
            LOGITS=num_logits, SIZE=size, SIZE_PAD=padded, BLOCK=block, num_warps=4, **shape, **launch_options(),
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_slot", "num_tokens", "num_items"])
def norm_route_kernel(  # type: ignore[no-untyped-def]
    stream_ptr, norm_ptr, router_ptr, x_ptr, lock_ptr, stride_stream, epsilon,
    logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, order_ptr, items_ptr, read_ptr,
    stride_logits, first_slot, num_tokens, num_items,
    LOGITS: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    TOKENS_PAD: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, RENORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK logits of every token, of the normed stream; see the module."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, SIZE_PAD)
    inside = at < SIZE
    # What no kernel before writes.
    router = tl.load(
        router_ptr + mine[:, None] * SIZE + at[None, :], mask=(mine < LOGITS)[:, None] & inside[None, :], other=0.0
    )
    weight = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for token in range(num_tokens):
        row = tl.load(stream_ptr + token * stride_stream + at, mask=inside, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(row * row, 0) / SIZE + epsilon)
        # Rounded where `rms_norm` rounds.
        x = ((row * factor).to(dtype).to(tl.float32) * weight).to(dtype)
        if tl.program_id(0) == 0:
            tl.store(x_ptr + token * SIZE + at, x, mask=inside)
        logits = tl.sum(router.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        tl.store(logits_ptr + token * stride_logits + mine, logits.to(logits_ptr.dtype.element_ty), mask=mine < LOGITS)
    tl.debug_barrier()
    arrived = tl.atomic_add(lock_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        route_all(
            logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, order_ptr, items_ptr, read_ptr,
            stride_logits, first_slot, num_tokens, num_items, EXPERTS, EXPERTS_PAD, TOP_K, TOP_K_PAD, TOKENS_PAD, ROWS,
            SPAN, RENORMALIZE, SHARED, PADDED,
        )  # fmt: skip
        tl.atomic_xchg(lock_ptr, 0)


@triton.jit(do_not_specialize=["first_slot", "num_tokens", "num_items"])
def route_few_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, order_ptr, items_ptr, read_ptr,
    stride_logits, first_slot, num_tokens, num_items,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    TOKENS_PAD: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, RENORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`route_all` of logits that are there."""
    await_previous(OVERLAP)
    route_all(
        logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, order_ptr, items_ptr, read_ptr,
        stride_logits, first_slot, num_tokens, num_items, EXPERTS, EXPERTS_PAD, TOP_K, TOP_K_PAD, TOKENS_PAD, ROWS,
        SPAN, RENORMALIZE, SHARED, PADDED,
    )  # fmt: skip


@triton.jit
def route_all(  # type: ignore[no-untyped-def]
    logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, order_ptr, items_ptr, read_ptr,
    stride_logits, first_slot, num_tokens, num_items,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    TOKENS_PAD: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, RENORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """All tokens: what `route_kernel` and `sort_kernel` do, with a pair's place told by how many pairs come before it.

    No total over all pairs is taken: the layout in which Triton (3.6 and 3.7) has the pairs as one row repeats them in
    lanes that it then adds up as if they were others, so each sum here is of a square's rows.
    """
    tokens, experts, picks = tl.arange(0, TOKENS_PAD), tl.arange(0, EXPERTS_PAD), tl.arange(0, TOP_K_PAD)
    exists = tokens < num_tokens
    lines = logits_ptr + tokens.to(tl.int64) * stride_logits
    is_logit = exists[:, None] & (experts < EXPERTS)[None, :]
    left = tl.load(lines[:, None] + experts[None, :], mask=is_logit, other=0.0, cache_modifier=".cg").to(tl.float32)
    left = tl.where((experts < EXPERTS)[None, :], left, float("-inf"))
    best = tl.max(left, 1)
    total = tl.sum(tl.exp2((left - best[:, None]) * 1.4426950408889634), 1)
    chosen = tl.full((TOKENS_PAD, TOP_K_PAD), EXPERTS, tl.int32)
    values = tl.zeros((TOKENS_PAD, TOP_K_PAD), tl.float32)
    for i in tl.static_range(TOP_K):
        value = tl.max(left, 1)
        # As in `route_kernel`.
        expert = tl.min(tl.where(left == value[:, None], experts[None, :], EXPERTS - 1), 1)
        chosen = tl.where((picks == i)[None, :], expert[:, None], chosen)
        values = tl.where((picks == i)[None, :], tl.exp2((value - best) * 1.4426950408889634)[:, None], values)
        left = tl.where(experts[None, :] == expert[:, None], float("-inf"), left)
    if RENORMALIZE:
        total = tl.sum(values, 1)
    is_computed = exists
    if PADDED:
        is_computed = exists & (tl.load(slots_ptr + tokens, mask=exists, other=0) >= first_slot)
    chosen = tl.where(is_computed[:, None], chosen, EXPERTS)
    at = tokens[:, None] * TOP_K + picks[None, :]
    inside = exists[:, None] & (picks < TOP_K)[None, :]
    tl.store(ids_ptr + at, chosen, mask=inside)
    tl.store(weights_ptr + at, values / total[:, None], mask=inside)
    if SHARED:
        gate = tl.load(lines + EXPERTS, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(shared_ptr + tokens, tl.sigmoid(gate), mask=exists)

    PAIRS: tl.constexpr = TOKENS_PAD * TOP_K_PAD
    expert = tl.reshape(chosen, (PAIRS,))
    pair = tl.reshape(at, (PAIRS,))
    index = tl.arange(0, PAIRS)
    is_pair = expert < EXPERTS
    key = expert * PAIRS + index
    before = key[None, :] < key[:, None]
    same = expert[None, :] == expert[:, None]
    place = tl.sum(before.to(tl.int32), 1)
    nth = tl.sum((before & same).to(tl.int32), 1)  # of its expert's
    count = tl.sum(same.to(tl.int32), 1)
    is_head = is_pair & (nth == 0)
    is_first = is_pair & (nth % ROWS == 0)  # of an item
    item = tl.sum((before & is_first[None, :]).to(tl.int32), 1)
    heads = tl.sum((before & is_head[None, :]).to(tl.int32), 1)
    # Every place is told by some pair: what is none comes behind all that are.
    tl.store(order_ptr + place, tl.where(is_pair, pair, -1), mask=place < num_tokens * TOP_K)
    # And every item: pairs that begin none take those from the last one down.
    slot = tl.where(is_first, item, PAIRS - 1 - (place - item))
    tl.store(items_ptr + slot, tl.where(is_first, expert, -1), mask=slot < num_items)
    first = nth // SPAN * SPAN
    tl.store(items_ptr + num_items + item, place - nth + first, mask=is_first)
    tl.store(items_ptr + 2 * num_items + item, place - nth + tl.minimum(first + SPAN, count), mask=is_first)
    tl.store(items_ptr + 3 * num_items + item, item - (nth - first) // ROWS, mask=is_first)
    # The last one has seen all others.
    tl.store(read_ptr + tl.zeros((PAIRS,), tl.int32), heads + is_head.to(tl.int32), mask=place == PAIRS - 1)
