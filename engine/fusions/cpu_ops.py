"""The operations of a fused layer on a CPU, by compiled kernels; products of whole weights in 16 bits are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.cpu.compiler import most_threads
from kvarena.engine.cpu.layers import glu_kernel, norm_kernel, rope_store_kernel
from kvarena.engine.cpu.panels import panel_kernel
from kvarena.engine.cpu.product import MOST_ROWS, fits, product_kernel
from kvarena.engine.cpu.simd import KINDS
from kvarena.engine.fusions.experts import Experts, add_experts
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, Linear, Norm, TorchOps, apply_linear
from kvarena.engine.fusions.panels import PanelLinear

# Elements of a call that are worth a thread, and multiplications of a product: 20 to 50 us of its time.
_PER_THREAD, _PRODUCTS_PER_THREAD = 2**16, 2**20
# Rows of a product in 16 bits for which the library's start costs more than its instructions save.
_FEW_ROWS = 4


class CpuOps(TorchOps):
    """See `kvarena.engine.fusions.ops.Ops`.

    Args:
        dtype: of weights and activations.
        kv_dtype: of the pool.
    """

    def __init__(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        kind, kv_kind = KINDS[dtype], KINDS[kv_dtype]
        self._norm, self._glu, self._rope_store = norm_kernel(kind), glu_kernel(kind), rope_store_kernel(kind, kv_kind)
        self._kind = kind
        self._panel_product = panel_kernel() if dtype == torch.float32 else None
        self._most_rows = MOST_ROWS if not _has_product(dtype) else _FEW_ROWS

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        if norm.weight.dtype != x.dtype:
            return super().norm(x, norm)
        x = x.contiguous()
        rows, width = x.shape
        out = torch.empty(rows, width, dtype=x.dtype)
        self._norm(_threads(rows * width), x.data_ptr(), norm.weight.data_ptr(), out.data_ptr(), rows, width, norm.eps)
        return out

    def norm_linear(
        self, residual: Tensor, norm: Norm, linear: Linear | PanelLinear, out: Tensor | None = None
    ) -> Tensor:
        """See `Ops.norm_linear`."""
        return self.linear(self.norm(residual, norm), linear, out)

    def linear(self, x: Tensor, linear: Linear | PanelLinear, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        if isinstance(linear, Linear) and not self._takes(x, linear.weight):
            return apply_linear(x, linear, out)
        whole = out is not None and out.dtype == torch.float32 and out.is_contiguous()
        y = self._product(x, linear, out if whole else None, adds=False)
        if linear.bias is not None:
            y += linear.bias
        if whole:
            return y
        return y.to(x.dtype) if out is None else out.copy_(y)

    def linear_residual(self, x: Tensor, linear: Linear | PanelLinear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        if isinstance(linear, Linear) and not self._takes(x, linear.weight):
            return super().linear_residual(x, linear, residual)
        if residual.dtype == torch.float32 and residual.is_contiguous():
            self._product(x, linear, residual, adds=True)
        else:
            residual += self._product(x, linear, None, adds=False)
        return residual if linear.bias is None else residual.add_(linear.bias)

    def _takes(self, x: Tensor, weight: Tensor) -> bool:
        rows = len(x)
        return rows <= self._most_rows and fits(rows, *weight.shape) and weight.is_contiguous()

    def _product(self, x: Tensor, linear: Linear | PanelLinear, y: Tensor | None, *, adds: bool) -> Tensor:
        """x @ weight.T in float32, in or added to `y` if given."""
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        rows, depth = x.shape
        width = linear.out_features
        y = torch.empty(rows, width) if y is None else y
        threads = _threads(rows * width * depth, _PRODUCTS_PER_THREAD)
        if isinstance(linear, Linear):
            product = product_kernel(self._kind, adds)
            product(threads, x.data_ptr(), linear.weight.data_ptr(), y.data_ptr(), rows, width, depth)
        elif self._panel_product is not None:
            panels = linear.panels.address
            self._panel_product(threads, x.data_ptr(), panels, y.data_ptr(), rows, width, depth, adds)
        return y

    def linear_glu(self, x: Tensor, gate_up: Linear | PanelLinear) -> Tensor:
        """See `Ops.linear_glu`."""
        return self.glu(self.linear(x, gate_up))

    def glu(self, x: Tensor) -> Tensor:
        """See `Ops.glu`."""
        x = x.contiguous()
        rows, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(rows, width, dtype=x.dtype)
        self._glu(_threads(2 * rows * width), x.data_ptr(), out.data_ptr(), rows, width)
        return out

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
        return add_experts(residual if into is None else into, self.norm(residual, norm), experts, slots, first_slot)

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
        """See `Ops.rope_store`. The queries are turned in place."""
        cos, sin = angles
        num_heads, num_kv_heads, head_dim = heads
        q_norm, k_norm, eps = (0, 0, 0.0)
        if norms is not None:
            q_norm, k_norm, eps = norms.q.weight.data_ptr(), norms.k.weight.data_ptr(), norms.q.eps
        self._rope_store(
            _threads(qkv.numel()), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), kv[0].data_ptr(),
            kv[1].data_ptr(), q_norm, k_norm, qkv.shape[0], num_heads, num_kv_heads, head_dim, cos.shape[1],
            cos.stride(0), turn_keys, eps,
        )  # fmt: skip
        return qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))


def _has_product(dtype: torch.dtype) -> bool:
    """Whether the library has instructions for products of 16 bits on this processor."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())


def _threads(work: int, per_thread: int = _PER_THREAD) -> int:
    return 1 if work < 2 * per_thread else min(most_threads(), work // per_thread)
