"""Linear layers with a packed weight: the module that stands in transformers' models, and its part in fused layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvarena.engine.quantization.hopper import HopperProduct
from kvarena.engine.quantization.products import PackedProduct
from kvarena.engine.quantization.state import PARTS, PackedSource
from kvarena.engine.quantization.weight import PackedWeight, join

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 512  # of a layer that is a part of a product


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed. Its tensors have the names of a `PackedWeight`'s fields.

    Args:
        source: the layer in its file: sizes and which tensors there are. Nothing is read.
        bias: of the linear layer that this one replaces, or None.
    """

    def __init__(self, source: PackedSource, bias: nn.Parameter | None) -> None:
        super().__init__()
        entry = source.entry
        self.in_features, self.out_features = entry.num_inputs, entry.num_outputs
        self._group_size = entry.group_size
        grouped, four = (entry.num_groups, entry.num_outputs), entry.bits == 4
        weight = entry.parts.get("weight")
        codes = torch.int32 if four else torch.int8 if weight is None or weight.dtype == "I8" else torch.float8_e4m3fn
        width = entry.num_inputs // 8 if four else entry.num_inputs
        shapes = {
            "codes": torch.empty((entry.num_outputs, width), dtype=codes),
            "scales": torch.empty(grouped, dtype=source.scale_dtype),
            "zeros": torch.empty(grouped, dtype=torch.uint8 if four else torch.int8),
            "order": torch.empty((entry.num_inputs,), dtype=torch.int32),
        }
        for name in PARTS:
            self.register_buffer(name, shapes[name] if name in source.part_names else None)
        self.bias = bias
        self._product: PackedProduct | None = None
        self._rows: slice | None = None

    @property
    def product(self) -> PackedProduct:
        """What multiplies; the module's tensors are moved to it."""
        if self._product is None:
            parts = {name: getattr(self, name) for name in PARTS}
            self._product = PackedProduct(PackedWeight(**parts, group_size=self._group_size))
            for name in PARTS:
                setattr(self, name, None)
        return self._product

    @property
    def weight_size(self) -> int:
        """Weights: outputs times inputs."""
        return self.in_features * self.out_features

    @property
    def num_bytes(self) -> float:
        """Memory of its weight; its share of a product that it has in common with others."""
        return self.product.num_bytes * self.out_features / self.product.shape[0]

    @property
    def shares(self) -> bool:
        """Whether its product is other layers' too."""
        return self._rows is not None

    def share(self, product: PackedProduct, rows: slice) -> None:
        """Go on with `rows` of a product that several layers have in common."""
        self._product, self._rows = product, rows

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = x.reshape(-1, self.in_features)
        if self._rows is None:
            return self.product(flat, self.bias).view(*x.shape[:-1], self.out_features)
        # The others' outputs are computed too, and thrown away: of some rows at a time, for the memory. What comes here
        # does not go through fused layers, such as the step that says what room there is for a pool.
        y = flat.new_empty(len(flat), self.out_features)
        for rows, out in zip(flat.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True):
            out.copy_(self.product(rows)[:, self._rows])
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class PackedProjection(NamedTuple):
    """A packed weight's part in a fused layer: `product` of [N, K], and `bias` [N] or None."""

    product: PackedProduct
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        """N."""
        return self.product.shape[0]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N], into `out` if given."""
        return self.product(x, self.bias, out=out)

    def add_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, N] + the projection of x, in place; returns it."""
        return self.product(x, self.bias, residual, residual)


def joined(layers: Sequence[PackedLinear]) -> PackedProjection | None:
    """Several layers of one input as one projection, in order; they go on with their rows of it.

    None, and nothing was done, where they are packed in different ways.
    """
    if len(layers) == 1:
        return PackedProjection(layers[0].product, layers[0].bias)
    products = [layer.product for layer in layers]
    if all(product is products[0] for product in products):
        return PackedProjection(products[0], _joined_bias(layers, products[0]))
    weights = [product.weight for product in products]
    known = [weight for weight in weights if weight is not None]
    weight = join(known) if len(known) == len(weights) else None
    if weight is None:
        return None
    product, start = PackedProduct(weight), 0
    for layer in layers:
        layer.share(product, slice(start, start + layer.out_features))
        start += layer.out_features
    return PackedProjection(product, _joined_bias(layers, product))


def _joined_bias(layers: Sequence[PackedLinear], product: PackedProduct) -> Tensor | None:
    """The layers' biases side by side, missing ones as 0; None where none has one."""
    there = [layer.bias for layer in layers if layer.bias is not None]
    if not there:
        return None
    assert sum(layer.out_features for layer in layers) == product.shape[0]
    parts = [there[0].new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([part.detach() for part in parts])


def settle_products(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Let every packed layer of a model take its fastest kernel; one line says why some do not.

    Args:
        module: the model; layers that will be joined are.
        dtype: of the inputs.

    Returns:
        Products by the name of their kernel; empty for a model without packed layers.
    """
    products = {id(layer.product): layer.product for layer in module.modules() if isinstance(layer, PackedLinear)}
    reasons: dict[str, int] = {}
    kernels: dict[str, int] = {}
    for product in products.values():
        reason = product.settle(dtype)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
        kernels[product.kernel] = kernels.get(product.kernel, 0) + 1
    for reason, count in reasons.items():
        logger.warning(
            "humming-kernels multiplies all but %d of %d packed weights, the Triton kernel these: %s",
            count, len(products), reason,
        )  # fmt: skip
    return kernels


def prepare_products(module: nn.Module, dtype: torch.dtype, rows: Iterable[int]) -> None:
    """Compile our own kernels for so many rows of x, several at a time; otherwise each is when it is first asked for.

    Args:
        module: the model, settled.
        dtype: of the inputs.
        rows: of x.
    """
    kinds: dict[object, tuple[HopperProduct, bool]] = {}
    for layer in module.modules():
        if isinstance(layer, PackedLinear) and isinstance(product := layer.product.fastest, HopperProduct):
            # Layers that share a product read the normed residual, and one alone adds to it.
            kinds.setdefault(product.kind, (product, layer.shares))
    for product, norm in kinds.values():
        product.prepare(rows, dtype, norm=norm)
