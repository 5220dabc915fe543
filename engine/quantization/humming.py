"""Packed products by humming-kernels: CUDA kernels, compiled when first needed, that multiply weights of few bits.

The library (Apache-2.0) is an optional extra; vLLM uses it too. It takes codes in order, so x is permuted for act-order
as for the Triton kernel, and scales in x's dtype. What it does is judged at load: a few rows go through it and through
the Triton kernel, and a product that differs is not used.

Source: humming-kernels 0.1.20, `humming.layer.HummingLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.quantization.weight import PackedWeight, pack_codes

NUM_ROWS = 4  # of the comparison
# Largest ||humming - triton|| / ||triton||: scales are rounded to x's dtype, sums in another order.
TOLERANCE = 0.02
_DTYPES = (torch.float16, torch.bfloat16)


class HummingProduct:
    """The product of one weight.

    Args:
        weight: on an NVIDIA card; not needed afterwards.
        dtype: of x: float16 or bfloat16.

    Raises:
        Exception: of any kind: the library does not take the weight, or cannot compile.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        from humming.layer import HummingLayer

        num_outputs, num_inputs = weight.shape
        name, codes = _codes(weight)
        grouped = len(weight.scales) > 1
        config = {"quant_method": "humming", "dtype": name, "group_size": weight.group_size if grouped else 0}
        tensors = {"weight": codes, "weight_scale": weight.scales.t().to(dtype).contiguous()}
        if weight.zeros is not None:
            config["has_zero_point"] = True
            # Outputs side by side in an int32, for each group.
            tensors["zero_point"] = pack_codes(weight.zeros).t().contiguous()
        with torch.device(codes.device), torch.cuda.device(codes.device):
            layer: Any = HummingLayer(shape_n=num_outputs, shape_k=num_inputs, weight_config=config, torch_dtype=dtype)
            layer.load_from_tensors(tensors)
            layer.transform()
        self._layer, self._order = layer, weight.order

    @property
    def num_bytes(self) -> int:
        """See `Product`."""
        return sum(p.numel() * p.element_size() for p in (*self._layer.parameters(), *self._layer.buffers()))

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """See `Product`."""
        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        if bias is None and residual is None and out is not None and out.is_contiguous():
            return self._layer(x, outputs=out)
        y = self._layer(x)
        for other in (bias, residual):
            y = y if other is None else y.add_(other)
        return y if out is None else out.copy_(y)


def humming_product(
    weight: PackedWeight, dtype: torch.dtype, judge: Callable[[Tensor, None, None, None], Tensor]
) -> tuple[HummingProduct | None, str | None]:
    """The product of `weight` by humming-kernels, and why there is none where the library is installed.

    Args:
        weight: on a GPU.
        dtype: of x.
        judge: another product of the same weight.
    """
    if torch.version.cuda is None or find_spec("humming") is None:
        return None, None
    if dtype not in _DTYPES:
        return None, f"it multiplies float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if weight.bits == 8 and weight.zeros is not None:
        return None, "it takes no zero points of 8 bits"
    try:
        product = HummingProduct(weight, dtype)
        x = torch.randn(NUM_ROWS, weight.shape[1], device=weight.codes.device, dtype=dtype)
        got, want = product(x, None, None, None).float(), judge(x, None, None, None).float()
    # Anything: it compiles for this card, with compilers that may not be there.
    except Exception as error:
        return None, str(error).strip().partition("\n")[0] or type(error).__name__
    difference = float((got - want).norm() / want.norm().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        return None, f"it differs from the Triton kernel (relative difference {difference:.2g})"
    return product, None


def _codes(weight: PackedWeight) -> tuple[str, Tensor]:
    """The codes' type as the library calls it, and they as it takes them: int32 [N, K * bits / 32]."""
    if weight.bits == 4:
        return "uint4", weight.codes
    if weight.codes.dtype == torch.int8:
        return "uint8", (weight.codes.view(torch.uint8) ^ 128).view(torch.int32)
    return "float8e4m3", weight.codes.view(torch.int32)
