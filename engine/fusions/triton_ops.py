"""The operations of a fused layer on a GPU: Triton and CUDA kernels, and the library's GEMM where tokens are many."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.hopper_products import HopperProducts
from kvarena.engine.fusions.ops import (
    Angles,
    HeadNorms,
    Heads,
    HeadSlots,
    Linear,
    Norm,
    Product,
    apply_linear,
    split_heads,
)
from kvarena.engine.kernels.activation import gated
from kvarena.engine.kernels.experts.few import RouterSource
from kvarena.engine.kernels.experts.layer import run_experts
from kvarena.engine.kernels.experts.routing import joins
from kvarena.engine.kernels.gemm.glu import gated_product
from kvarena.engine.kernels.gemm.library import load_library_gemm
from kvarena.engine.kernels.gemm.skinny import SkinnyGemm
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.gemm.turned import HeadsToStore
from kvarena.engine.kernels.norm import rms_norm
from kvarena.engine.kernels.rope import rope_store

# Of a product of experts: a hidden size of 65,536.
_MOST_COLUMN_TILES = 1024


class TritonOps:
    """See `kvarena.engine.fusions.ops.Ops`. All calls must be on one stream.

    Args:
        device: the GPU.
        table: which projections go to the skinny GEMM, and in which shape; None sends all to the library.
        upcast: see `SkinnyGemm`.
        hopper: with a table, use the CUDA kernels for Hopper where there is one.
    """

    def __init__(
        self,
        device: torch.device | str,
        table: GemmTable | None = None,
        *,
        upcast: bool = False,
        hopper: bool = True,
    ) -> None:
        self._table = table
        self._upcast = upcast
        self._hopper = None if table is None or not hopper else HopperProducts(device)
        self._gemm = None if table is None else SkinnyGemm(device, upcast=upcast)
        self._library = None if table is None else load_library_gemm(device)
        # Of launches in which the last program to come goes on.
        self._locks = torch.zeros(1 + _MOST_COLUMN_TILES, dtype=torch.int32, device=device)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        return rms_norm(x, norm.weight, norm.eps)

    def linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        y = self._product(Product(x, linear, out=out))
        return self._linear(x, linear, out) if y is None else y

    def linear_glu(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See `Ops.linear_glu`."""
        y = self._product(Product(x, gate_up, glu=True))
        return self.glu(self._linear(x, gate_up)) if y is None else y

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.norm_linear`."""
        y = self._product(Product(residual, linear, norm, out=out))
        return self._linear(self.norm(residual, norm), linear, out) if y is None else y

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        if self._product(Product(x, linear, residual=residual, out=residual)) is not None:
            return residual
        # Added by the product itself: one rounding less, and no pass of its own.
        if self._library is None or self._library(x, linear.weight, residual, accumulate=True) is None:
            residual.addmm_(x, linear.weight.t())
        return residual if linear.bias is None else residual.add_(linear.bias)

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """See `Ops.norm_glu`."""
        y = self._product(Product(residual, gate_up, norm, glu=True))
        return self.glu(self._linear(self.norm(residual, norm), gate_up)) if y is None else y

    def glu(self, x: Tensor) -> Tensor:
        """See `Ops.glu`."""
        return gated(x)

    def experts(
        self,
        residual: Tensor,
        norm: Norm,
        experts: Experts,
        slots: Tensor | None,
        first_slot: int,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """See `Ops.experts`. Its grids depend on T alone."""
        num_tokens, router = len(residual), experts.router
        source = None
        if joins(num_tokens, experts.top_k, experts.num_experts):
            x, logits = torch.empty_like(residual), residual.new_empty(num_tokens, len(router))
            source = RouterSource(residual, norm.weight, norm.eps, router, x, self._locks[:1])
        else:
            x = self.norm(residual, norm)
            logits = self._linear(x, Linear(router, None))
        upcast = self._upcast or x.dtype.itemsize == 4
        return run_experts(
            residual if into is None else into, x, logits, experts.gate_up, experts.down, slots, first_slot,
            top_k=experts.top_k, renormalize=experts.renormalize, num_read=experts.num_read, upcast=upcast,
            grouped=None if self._hopper is None else self._hopper.grouped, source=source,
            sum_locks=None if source is None else self._locks[1:],
        )  # fmt: skip

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear, to: HeadSlots) -> Tensor:
        """See `Ops.norm_heads`."""
        if self._hopper is not None:
            heads, norms, angles, slots, kv = to
            to_store = HeadsToStore(heads.num_heads, angles.cos, angles.sin, slots, kv[0], kv[1])
            if norms is not None:
                to_store = to_store._replace(q_norm=norms.q.weight, k_norm=norms.k.weight, eps=norms.q.eps)
            turned = self._hopper.heads(residual, norm, qkv, to_store)
            if turned is not None:
                return turned
        return self.rope_store(self.norm_linear(residual, norm, qkv), *to)

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
        q, k, v = split_heads(qkv, heads)
        rope_store(
            q,
            k,
            v,
            q,
            cos=angles.cos,
            sin=angles.sin,
            rotary_dim=2 * angles.cos.shape[1],
            keys=kv[0],
            values=kv[1],
            slot_mapping=slots,
            q_norm=None if norms is None else norms.q.weight,
            k_norm=None if norms is None else norms.k.weight,
            epsilon=0.0 if norms is None else norms.q.eps,
            turn_keys=turn_keys,
        )
        return q

    def _product(self, product: Product) -> Tensor | None:
        """By the kernel that is fastest among ours; None where that is the library's."""
        for kernel in (self._hopper, self._one_wave, self._skinny):
            if kernel is not None and (y := kernel(product)) is not None:
                return y
        return None

    def _one_wave(self, product: Product) -> Tensor | None:
        """The gated product of small models; None where its tiles do not fit into one wave."""
        x, linear, norm = product[:3]
        if self._table is None or not product.glu or linear.bias is not None:
            return None
        tile = self._table.find_glu(len(x), *linear.weight.shape)
        if tile is None:
            return None
        return gated_product(x if norm is None else self.norm(x, norm), linear.weight, tile, upcast=self._upcast)

    def _skinny(self, product: Product) -> Tensor | None:
        """By the skinny GEMM; None where its table has no launch."""
        x, linear, norm, residual, glu, out = product
        if self._table is None or self._gemm is None:
            return None
        config = self._table.find(len(x), *linear.weight.shape, glu=glu)
        if config is None:
            return None
        if norm is not None and not config.fuse_norm:
            x, norm = self.norm(x, norm), None
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return self._gemm(
            x, linear.weight, config, bias=linear.bias, norm=weight, eps=eps, residual=residual, glu=glu, out=out
        )

    def _linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """The product by the library, into `out` if given."""
        if self._library is not None and linear.bias is None:
            y = self._library(x, linear.weight, out)
            if y is not None:
                return y
        return apply_linear(x, linear, out)
