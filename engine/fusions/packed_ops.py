"""The operations of a fused layer whose projections may have packed weights: those go to their own kernels."""

from __future__ import annotations

from torch import Tensor

from kvarena.engine.fusions.forwarding_ops import ForwardingOps
from kvarena.engine.fusions.ops import HeadSlots, Linear, Norm
from kvarena.engine.quantization.linear import PackedProjection


class PackedOps(ForwardingOps):
    """See `ForwardingOps`. What comes before and after a packed product is fused where its kernel can.

    Experts with packed weights are modules of their own, and not among those of `experts`.
    """

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

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear | PackedProjection, to: HeadSlots) -> Tensor:
        """See `Ops.norm_heads`."""
        if isinstance(qkv, Linear):
            return self._ops.norm_heads(residual, norm, qkv, to)
        return self.rope_store(self.norm_linear(residual, norm, qkv), *to)
