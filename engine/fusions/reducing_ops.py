"""The operations of a fused layer whose row-parallel products are parts of a sum over ranks.

    linear_residual   a part is kept, and the residual is owed it
    norm ...          whoever reads the residual next pays: sum over the ranks, residual addition and norm in one

Between the two nobody looks at the residual: so one launch does all that stands between two products.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.forwarding_ops import ForwardingOps
from kvarena.engine.fusions.ops import HeadSlots, Linear, Norm, Ops


class Reducer(Protocol):
    """Sums over the ranks of a stage."""

    def sum(self, x: Tensor) -> Tensor:
        """`x` [T, H], overwritten with the sum over the ranks, or another tensor with it."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor | None:
        """Add the sum of all ranks' `x` to `residual`, in place, and return its norm; None: not in one launch."""
        ...


class ReducingOps(ForwardingOps):
    """See `ForwardingOps`.

    Args:
        ops: what computes on this rank.
        reducer: the ranks of the stage.

    Attributes:
        defers: parts are owed until the residual is read; without, each is added at once, for whoever looks at it.
    """

    def __init__(self, ops: Ops, reducer: Reducer) -> None:
        super().__init__(ops)
        self._reducer = reducer
        self.defers = False
        self._owed: Tensor | None = None

    def _pay(self, residual: Tensor, norm: Norm | None = None) -> Tensor | None:
        """Add what is owed; the normed residual, if that came of it."""
        owed, self._owed = self._owed, None
        if owed is None:
            return None
        normed = None if norm is None else self._reducer.add_norm(owed, residual, norm)
        if normed is None:
            residual.add_(self._reducer.sum(owed))
        return normed

    def settle(self, residual: Tensor) -> None:
        """Add what the residual is owed, for whoever is given it."""
        self._pay(residual)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        normed = self._pay(x, norm)
        return self._ops.norm(x, norm) if normed is None else normed

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.norm_linear`."""
        normed = self._pay(residual, norm)
        return (
            self._ops.norm_linear(residual, norm, linear, out) if normed is None else self.linear(normed, linear, out)
        )

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear, to: HeadSlots) -> Tensor:
        """See `Ops.norm_heads`."""
        normed = self._pay(residual, norm)
        if normed is None:
            return self._ops.norm_heads(residual, norm, qkv, to)
        return self.rope_store(self.linear(normed, qkv), *to)

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """See `Ops.norm_glu`."""
        normed = self._pay(residual, norm)
        return self._ops.norm_glu(residual, norm, gate_up) if normed is None else self.linear_glu(normed, gate_up)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        owed = self._owed
        self._owed = self._ops.linear(x, linear) if owed is None else self._ops.linear_residual(x, linear, owed)
        return self._now(residual)

    def experts(
        self,
        residual: Tensor,
        norm: Norm,
        experts: Experts,
        slots: Tensor | None,
        first_slot: int,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """See `Ops.experts`."""
        self._pay(residual)
        into = torch.zeros_like(residual) if into is None else into
        scale = self._ops.experts(residual, norm, experts, slots, first_slot, into)
        self._owed = into
        self._now(residual)
        return scale

    def _now(self, residual: Tensor) -> Tensor:
        if not self.defers:
            self._pay(residual)
        return residual
