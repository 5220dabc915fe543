"""All that a layer's experts launch behind the router's product, of grids that T alone decides.

What it is by how many rows an expert has:

    few of few tokens   [norm, router and] route and sort in one launch -> gate, up -> down [and sum] -> sum
    few                 route -> sort -> gate, up -> down -> sum
    many, on Hopper     route -> sort -> gather rows by expert -> gate, up -> down -> sum
"""

from __future__ import annotations

from torch import Tensor

from kvarena.engine.kernels.experts.few import RouterSource
from kvarena.engine.kernels.experts.grouped import SPAN_ITEMS, GroupedGemm, GroupedTile, gather_rows, grouped_tile
from kvarena.engine.kernels.experts.products import (
    ExpertTile,
    SumTarget,
    add_experts,
    down_product,
    gate_up_product,
    tile_for,
)
from kvarena.engine.kernels.experts.routing import route


def run_experts(
    residual: Tensor,
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor | None,
    first_slot: int,
    *,
    top_k: int,
    renormalize: bool,
    num_read: Tensor,
    upcast: bool,
    grouped: GroupedGemm | None = None,
    tile: ExpertTile | GroupedTile | None = None,
    down_tile: ExpertTile | None = None,
    source: RouterSource | None = None,
    sum_locks: Tensor | None = None,
) -> Tensor | None:
    """Add the experts' output for x [T, H] to `residual` [T, H], in place.

    Args:
        residual: written; not `x` itself.
        x: rows contiguous.
        logits: see `route`, as are `slots`, `first_slot`, `top_k`, `renormalize` and `num_read`.
        gate_up: [E, 2 * I, H], the gates' rows first.
        down: [E, H, I].
        upcast: see `kvarena.engine.kernels.gemm.skinny.SkinnyGemm`.
        grouped: for products of many rows, where it takes the operands; None: there is no Hopper GPU.
        tile: shape of the products' launches; None chooses by T. A `GroupedTile` needs `grouped`.
        down_tile: of the second product, if not the same; as many rows.
        source: `x` and `logits` are written first, in the launch that routes; see `route`.
        sum_locks: of a `SumTarget`, with which the second product adds its rows up itself; None: another launch does.

    Returns:
        float32 [T], the weight of a shared expert; None without a gate in `logits`.
    """
    num_experts, hidden, inner = down.shape
    num_pairs = len(x) * top_k
    if tile is None and grouped is not None and grouped.takes(x, gate_up, down):
        tile = grouped_tile(num_pairs, num_experts)
    if tile is None:
        tile = tile_for(num_pairs, num_experts, x.element_size())
    by_expert = isinstance(tile, GroupedTile)
    routing = route(
        logits, slots, first_slot, num_experts, top_k, renormalize=renormalize, tile_rows=tile.rows, num_read=num_read,
        span_items=SPAN_ITEMS if by_expert else 1, source=source,
    )  # fmt: skip
    act = x.new_empty(num_pairs, inner)
    if isinstance(tile, GroupedTile):
        assert grouped is not None, "a GroupedTile without a GroupedGemm"
        pairs, factors = gather_rows(x, routing)
        grouped.gate_up(pairs, gate_up, routing, act, tile)
        # Over the rows, which nobody needs any more.
        grouped.down(act, down, routing, factors, pairs, tile)
    else:
        pairs = x.new_empty(num_pairs, hidden)
        gate_up_product(x, gate_up, routing, act, tile, upcast=upcast)
        target = None if sum_locks is None else SumTarget(residual, sum_locks)
        down_product(act, down, routing, pairs, down_tile or tile, upcast=upcast, target=target)
        if target is not None:
            return routing.shared
    add_experts(pairs, routing, num_experts, residual)
    return routing.shared
