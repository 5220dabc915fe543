"""All that a layer's experts launch: five kernels behind the router's product, of grids that T alone decides."""

from __future__ import annotations

from torch import Tensor

from kvarena.engine.kernels.experts.products import (
    ExpertTile,
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
    tile: ExpertTile | None = None,
) -> Tensor | None:
    """Add the experts' output for x [T, H] to `residual` [T, H], in place.

    Args:
        residual: written; not `x` itself.
        x: rows contiguous.
        logits: see `route`, as are `slots`, `first_slot`, `top_k`, `renormalize` and `num_read`.
        gate_up: [E, 2 * I, H], the gates' rows first.
        down: [E, H, I].
        upcast: see `kvarena.engine.kernels.gemm.skinny.SkinnyGemm`.
        tile: shape of both products' launches; None chooses by T.

    Returns:
        float32 [T], the weight of a shared expert; None without a gate in `logits`.
    """
    num_experts, hidden, inner = down.shape
    num_pairs = len(x) * top_k
    if tile is None:
        tile = tile_for(num_pairs, num_experts, x.element_size())
    routing = route(
        logits, slots, first_slot, num_experts, top_k,
        renormalize=renormalize, tile_rows=tile.rows, num_read=num_read,
    )  # fmt: skip
    act, pairs = x.new_empty(num_pairs, inner), x.new_empty(num_pairs, hidden)
    gate_up_product(x, gate_up, routing, act, tile, upcast=upcast)
    down_product(act, down, routing, pairs, tile, upcast=upcast)
    add_experts(pairs, routing, num_experts, residual)
    return routing.shared
