"""The base of operations that do some of them in their own way, and leave the others to those that they are given."""

from __future__ import annotations

from torch import Tensor

from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, HeadSlots, Linear, Norm, Ops


class ForwardingOps:
    """See `kvarena.engine.fusions.ops.Ops`.

    Args:
        ops: what does everything that a subclass does not.
    """

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        return self._ops.norm(x, norm)

    def linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        return self._ops.linear(x, linear, out)

    def linear_glu(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See `Ops.linear_glu`."""
        return self._ops.linear_glu(x, gate_up)

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.norm_linear`."""
        return self._ops.norm_linear(residual, norm, linear, out)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        return self._ops.linear_residual(x, linear, residual)

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """See `Ops.norm_glu`."""
        return self._ops.norm_glu(residual, norm, gate_up)

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
        return self._ops.experts(residual, norm, experts, slots, first_slot, into)

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear, to: HeadSlots) -> Tensor:
        """See `Ops.norm_heads`."""
        return self._ops.norm_heads(residual, norm, qkv, to)

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
