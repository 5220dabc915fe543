"""Which experts compute which tokens, decided and sorted on the device, in launches of a fixed grid: two, or one of
few tokens.

    logits [T, E] -> route -> ids [T, k], weights [T, k]
    ids -> sort -> order    pairs (token * k + choice) by expert: |expert 0: 3 7|expert 1: |expert 2: 0 1 4 6|...
                   items    tiles of at most ROWS pairs of one expert, what one program of a product computes; in
                            spans of up to SPAN items of an expert, what neighbouring programs compute

Nothing depends on the host, so a graph that was captured for T tokens replays any routing. A token that only pads a
graph gets no expert: it would have weights read that nobody needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2
from kvarena.engine.kernels.experts.few import RouterSource, route_few_kernel

# So many pairs of few tokens are routed and sorted by one program, which compares each with each.
FEW_PAIRS, FEW_LOGITS = 64, 8192
# Most tokens whose norm and router are in that launch too, where every token is a pass of its own; eight at most by the
# pairs of usual models. None: on a card the launch was not measured beside the three that it stands for.
MOST_JOINED = 0
# Pairs of one step of the sort, by a program.
_SORT_BLOCK = 4096


class Routing(NamedTuple):
    """What the products need to know of T tokens with k experts each.

    Attributes:
        ids: int32 [T, k], the experts of each token, best first; the number of experts for a token that is padding.
        weights: float32 [T, k].
        order: int32 [T * k], pairs by expert, within one in order; -1 behind the last that is computed.
        items: int32 [4, I]: expert (-1 behind the last item); of the item's span the first and the end in `order`, and
            the first item. A span of one item is the item.
        shared: float32 [T], sigmoid of the shared expert's gate; None without one.
    """

    ids: Tensor
    weights: Tensor
    order: Tensor
    items: Tensor
    shared: Tensor | None


def max_items(num_pairs: int, num_experts: int, rows: int) -> int:
    """Most tiles of `rows` pairs that `num_pairs` pairs can make: each expert's last one may be all but empty."""
    return (num_pairs + min(num_pairs, num_experts) * (rows - 1)) // rows


def are_few(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether one program routes and sorts them."""
    padded = next_power_of_2(num_tokens)
    return padded * next_power_of_2(top_k) <= FEW_PAIRS and padded * next_power_of_2(num_experts) <= FEW_LOGITS


def joins(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether one launch does norm, router and `route`; see `RouterSource`."""
    return 0 < num_tokens <= MOST_JOINED and are_few(num_tokens, top_k, num_experts)


def route(
    logits: Tensor,
    slots: Tensor | None,
    first_slot: int,
    num_experts: int,
    top_k: int,
    *,
    renormalize: bool,
    tile_rows: int,
    num_read: Tensor,
    span_items: int = 1,
    source: RouterSource | None = None,
) -> Routing:
    """Route tokens to experts: softmax in float32, the `top_k` most likely, and the sort of what comes of it.

    Args:
        logits: [T, num_experts], or with one column more, the gate of a shared expert.
        slots: int64 [T]; tokens with one below `first_slot` are padding. None: there is none.
        first_slot: of the pool behind the null block.
        num_experts: of the layer.
        top_k: experts of a token.
        renormalize: make a token's weights add up to 1.
        tile_rows: pairs of an item.
        num_read: int32 [1], written: how many experts have a token.
        span_items: of one expert, most items of a span.
        source: what the logits are made of, in the same launch, of as few tokens as `joins` allows; they are written.

    Source: Shazeer et al., 2017 (top-k gating); the tiles are those of MegaBlocks (Gale et al., 2022), without padding.
    """
    num_tokens, device = len(logits), logits.device
    num_pairs = num_tokens * top_k
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    has_shared = logits.shape[1] > num_experts
    shared = torch.empty(num_tokens, dtype=torch.float32, device=device) if has_shared else None
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    count = max_items(num_pairs, num_experts, tile_rows)
    items = torch.empty(4, count, dtype=torch.int32, device=device)
    inputs = (logits, ids if slots is None else slots, ids, weights, weights if shared is None else shared)
    sizes = {
        "EXPERTS": num_experts, "EXPERTS_PAD": next_power_of_2(num_experts), "TOP_K": top_k,
        "TOP_K_PAD": next_power_of_2(top_k), "RENORMALIZE": renormalize, "SHARED": has_shared,
        "PADDED": slots is not None,
    }  # fmt: skip
    spans = {"ROWS": tile_rows, "SPAN": span_items * tile_rows}
    if are_few(num_tokens, top_k, num_experts):
        given = (*inputs, order, items, num_read, logits.stride(0), first_slot, num_tokens, count)
        shape = {**sizes, **spans, "TOKENS_PAD": next_power_of_2(num_tokens)}
        if source is not None:
            source.launch(logits.shape[1], given, shape)
        else:
            warps = 1 if num_tokens == 1 else 4
            route_few_kernel[(1,)](*given, num_warps=warps, **shape, **launch_options())
    else:
        route_kernel[(num_tokens,)](
            *inputs, logits.stride(0), first_slot, num_warps=1, **sizes, **launch_options()
        )  # fmt: skip
        block = min(_SORT_BLOCK, max(128, next_power_of_2(num_pairs)))
        sort_kernel[(num_experts,)](
            ids, order, items, num_read, num_pairs, count,
            EXPERTS=num_experts, EXPERTS_PAD=next_power_of_2(num_experts + 1), BLOCK=block,
            num_warps=max(4, block // 256), **spans, **launch_options(),
        )  # fmt: skip
    return Routing(ids, weights, order, items, shared)


@triton.jit(do_not_specialize=["first_slot"])
def route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, stride_logits, first_slot,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    RENORMALIZE: tl.constexpr, SHARED: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: its experts and their weights."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERTS_PAD)
    line = logits_ptr + row * stride_logits
    left = tl.load(line + experts, mask=experts < EXPERTS, other=float("-inf")).to(tl.float32)
    best = tl.max(left, 0)
    total = tl.sum(tl.exp2((left - best) * 1.4426950408889634), 0)
    picks = tl.arange(0, TOP_K_PAD)
    chosen = tl.full((TOP_K_PAD,), EXPERTS, tl.int32)
    values = tl.zeros((TOP_K_PAD,), tl.float32)
    for i in tl.static_range(TOP_K):
        value = tl.max(left, 0)
        # Logits that are no numbers must still not lead outside of the weights, nor each lane to another expert, as
        # argmax would: it compares, and of two that are no numbers takes the one that came second.
        expert = tl.min(tl.where(left == value, experts, EXPERTS - 1), 0)
        chosen = tl.where(picks == i, expert, chosen)
        values = tl.where(picks == i, tl.exp2((value - best) * 1.4426950408889634), values)
        left = tl.where(experts == expert, float("-inf"), left)
    if RENORMALIZE:
        total = tl.sum(values, 0)
    if PADDED:
        chosen = tl.where(tl.load(slots_ptr + row) < first_slot, EXPERTS, chosen)
    tl.store(ids_ptr + row * TOP_K + picks, chosen, mask=picks < TOP_K)
    tl.store(weights_ptr + row * TOP_K + picks, values / total, mask=picks < TOP_K)
    if SHARED:
        tl.store(shared_ptr + row, tl.sigmoid(tl.load(line + EXPERTS).to(tl.float32)))


@triton.jit(do_not_specialize=["num_pairs", "num_items"])
def sort_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, order_ptr, items_ptr, read_ptr, num_pairs, num_items,
    EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One expert: its pairs and items. Each program counts all experts' pairs, which saves a launch in between."""
    await_previous(OVERLAP)
    mine = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PAD)
    counts = tl.zeros((EXPERTS_PAD,), tl.int32)
    for first in range(0, num_pairs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        # Padding, and what lies behind the last pair, is counted in a column that is then left out.
        counts += tl.histogram(tl.load(ids_ptr + at, mask=at < num_pairs, other=EXPERTS), EXPERTS_PAD)
    counts = tl.where(experts < EXPERTS, counts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    count = tl.sum(tl.where(experts == mine, counts, 0), 0)
    begin = tl.sum(tl.where(experts < mine, counts, 0), 0)
    first_item = tl.sum(tl.where(experts < mine, tiles, 0), 0)
    place = begin
    for first in range(0, num_pairs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        is_mine = (tl.load(ids_ptr + at, mask=at < num_pairs, other=EXPERTS) == mine).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(is_mine, 0) - 1, at, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)
    for first in range(0, count, ROWS):
        item = items_ptr + first_item + first // ROWS
        span = first // SPAN * SPAN
        tl.store(item, mine)
        tl.store(item + num_items, begin + span)
        tl.store(item + 2 * num_items, begin + tl.minimum(span + SPAN, count))
        tl.store(item + 3 * num_items, first_item + span // ROWS)
    if mine == 0:
        tl.store(read_ptr, tl.sum((counts > 0).to(tl.int32), 0))
        nothing = tl.full((BLOCK,), -1, tl.int32)
        for first in range(tl.sum(tiles, 0), num_items, BLOCK):
            rest = first + tl.arange(0, BLOCK)
            tl.store(items_ptr + rest, nothing, mask=rest < num_items)
        for first in range(tl.sum(counts, 0), num_pairs, BLOCK):
            rest = first + tl.arange(0, BLOCK)
            tl.store(order_ptr + rest, nothing, mask=rest < num_pairs)
