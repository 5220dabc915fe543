"""Several projections of one input as one: their weights are joined, and the modules keep views of the joined ones.

    q_proj.weight [Nq, K]  \
    k_proj.weight [Nk, K]   >  packed [Nq + Nk + Nv, K];  q_proj.weight = packed[:Nq], ...
    v_proj.weight [Nv, K]  /

So the unfused modules go on working and no weight is in memory twice. While a layer is packed, its weights are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvarena.engine.fusions.ops import Linear
from kvarena.engine.quantization.linear import PackedLinear, PackedProjection, joined


def projection(layers: Sequence[nn.Linear | PackedLinear]) -> Linear | PackedProjection | None:
    """One or several linear layers of one input as one projection, which shares their weights.

    None where some are packed and others not, or packed in different ways; nothing was changed then.
    """
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    plain = [layer for layer in layers if not isinstance(layer, PackedLinear)]
    if packed:
        return None if plain else joined(packed)
    if len(plain) > 1:
        return pack(plain)
    return Linear(plain[0].weight.detach(), None if plain[0].bias is None else plain[0].bias.detach())


def pack(projections: Sequence[nn.Linear]) -> Linear:
    """Join the projections' rows; their parameters become views of the result.

    Args:
        projections: of one input width and dtype. Where some have a bias and others not, the missing ones count as 0.

    Returns:
        weight [sum of rows, K] and bias, in the order of `projections`.
    """
    weight = _join([projection.weight for projection in projections])
    if all(projection.bias is None for projection in projections):
        return Linear(weight, None)
    biases: list[Tensor] = []
    for projection in projections:
        missing = nn.Parameter(weight.new_zeros(projection.out_features), requires_grad=False)
        biases.append(missing if projection.bias is None else projection.bias)
    return Linear(weight, _join(biases))


def _join(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; each parameter becomes a view of its part. Joined ones are not joined again."""
    first = parameters[0]
    end = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end or not parameter.is_contiguous():
            break
        end += parameter.numel() * parameter.element_size()
    else:
        rows = sum(len(parameter) for parameter in parameters)
        if (end - first.data_ptr()) <= first.untyped_storage().nbytes() and rows > len(first):
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined
