"""Which kernel multiplies a packed weight: our CUDA kernel, humming-kernels', our Triton kernel, or none.

    PackedLinear, FusedLayer -> PackedProduct -> TritonProduct     until it is settled, and where the others refuse
                                              -> HopperProduct     after `settle`: 4 bits on Hopper, in its own layout
                                              -> HummingProduct    likewise: other NVIDIA cards, and 8 bits
                                              -> PlainProduct      on a CPU, and what no kernel takes: dequantised

A product is settled when nobody will join it with others any more.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.quantization.hopper import HopperProduct, hopper_product
from kvarena.engine.quantization.weight import PackedWeight

logger = logging.getLogger(__name__)


class Product(Protocol):
    """x @ weight.T for one weight, whose bytes it owns."""

    @property
    def num_bytes(self) -> int:
        """Memory of the weight."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """x [M, K] -> [M, N], with what is not None added, into `out` if given. `residual` may be `out` itself."""
        ...


class PlainProduct:
    """Dequantises the weight for each product, in x's dtype: for devices and groups without a kernel."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight

    @property
    def num_bytes(self) -> int:
        """See `Product`."""
        return self._weight.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """See `Product`."""
        y = F.linear(x, self._weight.dequantize(x.dtype), bias)
        y = y if residual is None else y.add_(residual)
        return y if out is None else out.copy_(y)


class TritonProduct:
    """The Triton kernel of engine/kernels/gemm/packed.py."""

    def __init__(self, weight: PackedWeight) -> None:
        # Imported here: Triton is not needed, and may not be there, without a GPU.
        from kvarena.engine.kernels.gemm.packed import packed_gemm

        self._weight, self._gemm = weight.without_zeros(), packed_gemm

    @property
    def num_bytes(self) -> int:
        """See `Product`."""
        return self._weight.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """See `Product`."""
        weight = self._weight
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        elif x.stride(1) != 1:
            x = x.contiguous()
        return self._gemm(
            x, weight.codes, weight.scales, weight.zeros, weight.group_size, bias=bias, residual=residual, out=out
        )


def first_product(weight: PackedWeight) -> Product:
    """What multiplies a weight before it is settled."""
    if weight.codes.device.type == "cpu" or not has_launch(weight):
        return PlainProduct(weight)
    return TritonProduct(weight)


def has_launch(weight: PackedWeight) -> bool:
    """Whether the Triton kernel takes such groups."""
    from kvarena.engine.kernels.gemm.packed import packed_tile

    return weight.row_groups is None and packed_tile(1, weight.shape[1], weight.group_size) is not None


class PackedProduct:
    """A packed weight and what multiplies it.

    Args:
        weight: several layers may hold the same product, each some of its outputs.

    Attributes:
        is_gated: the first half of the outputs is a gate's, the other its up value's; to be said before `settle`.
    """

    def __init__(self, weight: PackedWeight) -> None:
        self.shape = weight.shape
        self.weight: PackedWeight | None = weight
        self.is_gated = False
        self._product = first_product(weight)
        self._is_settled = False

    @property
    def num_bytes(self) -> int:
        """Memory of the weight."""
        return self._product.num_bytes

    @property
    def fastest(self) -> Product:
        """What multiplies."""
        return self._product

    @property
    def kernel(self) -> str:
        """Of whom the product is, for messages: Hopper, Humming, Triton or Plain."""
        return type(self._product).__name__.removesuffix("Product")

    def settle(self, dtype: torch.dtype) -> str | None:
        """Take the fastest kernel for inputs of `dtype`. `weight` is None where it has another form then.

        Returns:
            Why it is not humming-kernels' where that is installed and ours does not serve; None otherwise.
        """
        if self._is_settled or self.weight is None or not isinstance(self._product, TritonProduct):
            return None
        from kvarena.engine.quantization.humming import humming_product

        self._is_settled = True
        weight, judge = self.weight.without_zeros(), self._product
        ours = hopper_product(weight, dtype, judge, gated=self.is_gated)
        if ours is not None:
            self._product, self.weight = ours, None
            return None
        theirs, reason = humming_product(weight, dtype, judge)
        if theirs is not None:
            self._product, self.weight = theirs, None
        return reason

    def fused(
        self, x: Tensor, norm: tuple[Tensor, float] | None, residual: Tensor | None, out: Tensor | None, *, glu: bool
    ) -> Tensor | None:
        """[norm ->] x @ weight.T [-> silu(gate) * up] [+ residual] at once; None where no kernel does that.

        `norm`: weight [K] and epsilon of an RMS norm.
        """
        product = self._product
        if not isinstance(product, HopperProduct) or product.is_gated != glu:
            return None
        return product.fused(x, norm, residual, out, glu=glu)

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x [M, K] @ weight.T + bias + residual, into `out` if given: [M, N]."""
        return self._product(x, bias, residual, out)
