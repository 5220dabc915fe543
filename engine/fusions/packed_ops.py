"""The operations of a fused layer whose projections may have packed weights: those go to their own kernels."""

from __future__ import annotations

from torch import Tensor

from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, Linear, Norm, Ops
from kvarena.engine.quantization.linear import PackedProjection


class PackedOps:
    """See `kvarena.engine.fusions.ops.Ops`. What comes before and after a packed product is fused where its kernel can.

    Args:
        ops: everything else, and projections that are not packed.
    """

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        return self._ops.norm(x, norm)

    def linear(self, x: Tensor, linear: Linear | PackedProjection, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        return linear(x, out) if isinstance(linear, PackedProjection) else self._ops.linear(x, linear, out)

    def linear_glu(self, x: Tensor, gate_up: Linear | PackedProjection) -> Tensor:
        """See `Ops.linear_glu`."""
        if isinstance(gate_up, PackedProjection):
            return self._ops.glu(gate_up(x))
        return self._ops.linear_glu(x, gate_up)

    def norm_linear(
        self, residual: Tensor, norm: Norm, linear: Linear | PackedProjection, out: Tensor | None = None
    ) -> Tensor:
        """See `Ops.norm_linear`."""
        if isinstance(linear, Linear):
            return self._ops.norm_linear(residual, norm, linear, out)
        y = None if linear.bias is not None else linear.product.fused(residual, norm, None, out, glu=False)
        return linear(self._ops.norm(residual, norm), out) if y is None else y

    def linear_residual(self, x: Tensor, linear: Linear | PackedProjection, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        if isinstance(linear, Linear):
            return self._ops.linear_residual(x, linear, residual)
        return linear.add_to(x, residual)

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear | PackedProjection) -> Tensor:
        """See `Ops.norm_glu`."""
        if isinstance(gate_up, Linear):
            return self._ops.norm_glu(residual, norm, gate_up)
        y = None if gate_up.bias is not None else gate_up.product.fused(residual, norm, None, None, glu=True)
        return self._ops.glu(gate_up(self._ops.norm(residual, norm))) if y is None else y

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
        """See `Ops.experts`. Packed experts are modules of their own, and not among these."""
        return self._ops.experts(residual, norm, experts, slots, first_slot, into)

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
