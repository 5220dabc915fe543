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
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, Linear, Norm, Ops


class Reducer(Protocol):
    """Sums over the ranks of a stage."""

    def sum(self, x: Tensor) -> Tensor:
        """`x` [T, H], overwritten with the sum over the ranks, or another tensor with it."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor | None:
        """Add the sum of all ranks' `x` to `residual`, in place, and return its norm; None: not in one launch."""
        ...


class ReducingOps:
    """See `kvarena.engine.fusions.ops.Ops`.

    Args:
        ops: what computes on this rank.
        reducer: the ranks of the stage.

    Attributes:
        defers: parts are owed until the residual is read; without, each is added at once, for whoever looks at it.
    """

    def __init__(self, ops: Ops, reducer: Reducer) -> None:
        self._ops, self._reducer = ops, reducer
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

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        normed = self._pay(x, norm)
        return self._ops.norm(x, norm) if normed is None else normed

    def linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        return self._ops.linear(x, linear, out)

    def linear_glu(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See `Ops.linear_glu`."""
        return self._ops.linear_glu(x, gate_up)

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.norm_linear`."""
        normed = self._pay(residual, norm)
        return (
            self._ops.norm_linear(residual, norm, linear, out) if normed is None else self.linear(normed, linear, out)
        )

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """See `Ops.norm_glu`."""
        normed = self._pay(residual, norm)
        return self._ops.norm_glu(residual, norm, gate_up) if normed is None else self.linear_glu(normed, gate_up)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        owed = self._owed
        self._owed = self._ops.linear(x, linear) if owed is None else self._ops.linear_residual(x, linear, owed)
        return self._now(residual)

    def glu(self, x: Tensor) -> Tensor:
        """See `Ops.glu`."""
        return self._ops.glu(x)

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

    def rope_store(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        angles: Angles,
        slots: Tensor,
        kv: tuple[Tensor, Tensor],
        *,
        turn_keys: bool = False,
    ) -> Tensor:
        """See `Ops.rope_store`."""
        return self._ops.rope_store(qkv, heads, norms, angles, slots, kv, turn_keys=turn_keys)

    def _now(self, residual: Tensor) -> Tensor:
        if not self.defers:
            self._pay(residual)
        return residual
