"""Weights of fused layers in panels, as a CPU's products read them, in place of the modules' own.

    weight [N, K]  -->  panels [ceil(N / width), K, width]     outputs side by side, behind the last one zeros

While a model runs so its linear modules hold nothing: no weight is in memory twice. `restore` gives them theirs back.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.layers import FusedExperts, FusedGlu, FusedLayer
from kvarena.engine.fusions.ops import Linear
from kvarena.engine.models.spec import LoadedModel

LARGE_PAGE = 2 << 20  # bytes
_KEPT = "weight_in_panels"  # of a module without a weight of its own: the panels, and its first row in them
_CHECKED_ROWS, _TOLERANCE = 9, 1e-4


@dataclass(frozen=True)
class Panels:
    """A weight [N, K] in panels.

    Attributes:
        data: float32 [ceil(N / width), K, width].
        num_rows: N.
        address: of the data.
    """

    data: Tensor
    num_rows: int
    address: int

    @classmethod
    def of(cls, weight: Tensor, width: int) -> Panels:
        """A copy of `weight`, in large pages where the system has them."""
        num_rows, depth = weight.shape
        data = torch.empty(-(-num_rows // width), depth, width)
        _ask_for_large_pages(data)
        whole = num_rows // width
        data[:whole] = weight[: whole * width].view(whole, width, depth).transpose(1, 2)
        if whole < len(data):
            data[whole] = 0
            data[whole, :, : num_rows - whole * width] = weight[whole * width :].t()
        return cls(data, num_rows, data.data_ptr())

    def __call__(self, indices: Tensor) -> Tensor:
        """Rows of the weight, [*indices.shape, K]."""
        width = self.data.shape[2]
        return self.data[indices // width, :, indices % width]


class PanelLinear(NamedTuple):
    """A `Linear` whose weight is in panels."""

    panels: Panels
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        """N."""
        return self.panels.num_rows


def in_panels(decoder: FusedDecoder, model: LoadedModel, width: int) -> FusedDecoder:
    """The decoder with its plain float32 projections in panels; takes the weights from `decoder` and the modules.

    Args:
        decoder: checked, of `model`. Not usable afterwards.
        model: loses the weights that are in panels, until `restore`.
        width: outputs of a panel.

    Raises:
        EngineError: a product differs from torch's.
    """
    owners = [module for module in model.module.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    ops = decoder.ops
    layers = tuple(_layer(layer, owners, ops, width) for layer in decoder.layers)
    embedding: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    head, embed = decoder.head, decoder.embed
    is_tied = isinstance(head, Linear) and head.weight.data_ptr() == embedding.weight.data_ptr()
    if not (is_tied and model.images is not None):  # whose inputs are made of the embedding's own weight
        head = _moved(head, owners, ops, width)
        if is_tied and isinstance(head, PanelLinear):
            embed = head.panels
    return replace(decoder, layers=layers, head=head, embed=embed)


def restore(model: LoadedModel) -> None:
    """Give the modules of `model` the weights that `in_panels` took. Nothing to do for others."""
    for module in model.module.modules():
        if (kept := module.__dict__.pop(_KEPT, None)) is not None:
            panels, first, count = kept
            module.weight.data = panels(torch.arange(first, first + count))


def _layer(layer: FusedLayer, owners: list[Any], ops: Any, width: int) -> FusedLayer:
    attention, mlp = layer.attention, layer.mlp
    attention = replace(
        attention,
        qkv=_moved(attention.qkv, owners, ops, width),
        out=_moved(attention.out, owners, ops, width),
    )
    if isinstance(mlp, FusedExperts) and mlp.shared is not None:
        mlp = replace(mlp, shared=_glu(mlp.shared, owners, ops, width))
    elif isinstance(mlp, FusedGlu):
        mlp = _glu(mlp, owners, ops, width)
    return replace(layer, attention=attention, mlp=mlp)


def _glu(glu: FusedGlu, owners: list[Any], ops: Any, width: int) -> FusedGlu:
    return replace(glu, gate_up=_moved(glu.gate_up, owners, ops, width), down=_moved(glu.down, owners, ops, width))


def _moved(projection: Any, owners: list[Any], ops: Any, width: int) -> Any:
    """The projection in panels, its weight taken from all who have it; any but a plain float32 one as it is."""
    if not isinstance(projection, Linear) or projection.weight.dtype != torch.float32:
        return projection
    weight = projection.weight.contiguous()
    moved = PanelLinear(Panels.of(weight, width), projection.bias)
    _check(moved, Linear(weight, projection.bias), ops)
    start, row = projection.weight.data_ptr(), weight.shape[1] * weight.element_size()
    for owner in owners:
        first = (owner.weight.data_ptr() - start) // row
        if len(owner.weight) and 0 <= first < len(weight):
            owner.__dict__[_KEPT] = moved.panels, first, len(owner.weight)
            owner.weight.data = owner.weight.new_empty(0, weight.shape[1])
    projection.weight.data = weight.new_empty(0, weight.shape[1])
    return moved


def _check(moved: PanelLinear, plain: Linear, ops: Any) -> None:
    """Compare a product with torch's."""
    depth = plain.weight.shape[1]
    x = torch.linspace(-1, 1, _CHECKED_ROWS * depth).view(-1, depth).sin_()
    want = torch.nn.functional.linear(x, plain.weight, plain.bias)
    distance = float((ops.linear(x, moved) - want).norm())
    if not distance <= _TOLERANCE * float(want.norm()):
        raise EngineError(
            f"the compiled product of [{_CHECKED_ROWS}, {depth}] with a weight {list(plain.weight.shape)} differs from "
            f"torch's on this processor (relative difference {distance / float(want.norm()):.2g}); set "
            "runner.cpu=modules"
        )


def _ask_for_large_pages(data: Tensor) -> None:
    """A stream through pages of 4 KiB waits for the page table; asked for before memory is touched. Linux alone."""
    advice, size = getattr(mmap, "MADV_HUGEPAGE", None), data.numel() * data.element_size()
    if advice is None or size < LARGE_PAGE:
        return
    page = mmap.PAGESIZE
    start = -(-data.data_ptr() // page) * page
    # Only advice: where it is refused, pages are small ones.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(data.data_ptr() + size - start), advice)
