"""InternVL's vision tower in few passes, for InternViT's common kind: layer norms, exact GELU, layer scale.

    bytes -> rows of patches -> product onto positions -> x [N, 1 + P, hidden]
    layer:  norm -> q,k,v as one product -> attention -> x += product | norm -> product -> GELU -> x += product
    four neighbours of x side by side -> norm -> product -> GELU -> product -> [N, tokens, hidden of the model]

Layer scales are multiplied into the weights of the products before them, once. Those products are added to x by
themselves, and their biases never are: a layer's input lacks the same vector in every row, the sum of all biases before
it, which its norm adds as it reads (`offset`). So x is written by products alone, and a layer has two passes of its own
over it and one over the wide activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLVisionLayer

# On Hopper the first that takes the shape is the fastest; a CPU has its own.
ATTENTION: tuple[SDPBackend, ...] = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
# Elements of a row that the library's fast products want whole.
_ALIGNED = 8


class TowerNorm(NamedTuple):
    """A layer norm of `x + offset`: offset float32 [size], weight and bias [size]; with neighbours [parts * size]."""

    offset: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class TowerOps(NamedTuple):
    """What the tower computes beside products and attention.

    Attributes:
        patch_rows: see `kvarena.engine.kernels.patches.patch_rows`.
        layer_norm: see `kvarena.engine.kernels.norm.layer_norm`.
    """

    patch_rows: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    layer_norm: Callable[..., Tensor]


def tower_ops(device: torch.device) -> TowerOps:
    """In plain torch, or by Triton kernels on a GPU."""
    if device.type != "cuda":
        return TowerOps(_patch_rows, _layer_norm)
    # Imported here: Triton is not needed, and may not be there, without a GPU.
    from kvarena.engine.kernels import norm, patches

    return TowerOps(patches.patch_rows, norm.layer_norm)


def _patch_rows(tiles: Tensor, values: Tensor, patch: int, out: Tensor) -> Tensor:
    """See `TowerOps`."""
    num, channels, size = tiles.shape[:3]
    side = size // patch
    pixels = values[torch.arange(channels, device=tiles.device)[:, None, None], tiles.int()]
    cut = pixels.view(num, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    rows = cut.reshape(num, side * side, -1)
    return out.copy_(F.pad(rows, (0, out.shape[2] - rows.shape[2])))


def _layer_norm(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, epsilon: float, index: Tensor | None = None
) -> Tensor:
    """See `TowerOps`."""
    if index is not None:
        x = x[:, index.long()]
    wide = (x.float() + offset).reshape(-1, len(weight))
    return F.layer_norm(wide, (len(weight),), weight.float(), bias.float(), epsilon).to(x.dtype)


class TowerLayer(NamedTuple):
    """A layer's packed weights: [out, in] each, the layer scales in `out` and `fc2`."""

    norm_1: TowerNorm
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    norm_2: TowerNorm
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor


class FusedTower:
    """The tower and its projector.

    Args:
        tower: transformers' InternVLVisionModel, of which `reason` finds nothing to say. Its layers' weights become
            views of the packed ones, and scaled: it computes what it did before.
        projector: transformers' own.
        config: the whole model's.
        transposed: the grid's rows and columns change places before the projector.
        values: float32 [channels, 256], what each byte of each channel becomes.
        size: pixels of a tile's side.

    Attributes:
        attention: PyTorch's kernels in the order in which they are asked; on a GPU.
    """

    def __init__(
        self, tower: Any, projector: Any, config: InternVLConfig, *, transposed: bool, values: Tensor, size: int
    ) -> None:
        vision: Any = config.vision_config
        self.attention: tuple[SDPBackend, ...] = ATTENTION
        self._heads, self._patch = vision.num_attention_heads, vision.patch_size[0]
        self._values, self._projector = values, projector
        weight = tower.embeddings.patch_embeddings.projection.weight.detach().flatten(1)
        self._ops: TowerOps = tower_ops(weight.device)
        self._depth = -(-weight.shape[1] // _ALIGNED) * _ALIGNED
        self._patches = F.pad(weight, (0, self._depth - weight.shape[1])).t().contiguous()
        self._base = _base(tower.embeddings, size)
        offset = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        self._layers: list[TowerLayer] = []
        for layer in tower.encoder.layer:
            packed, offset = _pack(layer, offset)
            self._layers.append(packed)
        self._neighbours = _neighbours(size // self._patch, config.downsample_ratio, transposed=transposed)
        self._neighbours = self._neighbours.to(weight.device)
        norm = projector.layer_norm
        self._norm = TowerNorm(offset, norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, tiles: Tensor) -> Tensor:
        """Encode tiles: uint8 [N, channels, size, size], contiguous, to [N, tokens, hidden of the model]."""
        if tiles.device.type != "cuda":
            return self._forward(tiles)
        with sdpa_kernel(list(self.attention), set_priority=True):
            return self._forward(tiles)

    def _forward(self, tiles: Tensor) -> Tensor:
        num = len(tiles)
        x = self._base.repeat(num, 1, 1)
        hidden = x.shape[2]
        rows = self._ops.patch_rows(tiles, self._values, self._patch, x.new_empty(num, x.shape[1] - 1, self._depth))
        x[:, 1:].baddbmm_(rows, self._patches.expand(num, -1, -1))
        flat = x.view(-1, hidden)
        for layer in self._layers:
            qkv = F.linear(self._ops.layer_norm(x, *layer.norm_1), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.view(num, -1, 3, self._heads, hidden // self._heads).permute(2, 0, 3, 1, 4).unbind()
            attended = F.scaled_dot_product_attention(q, k, v)
            flat.addmm_(attended.transpose(1, 2).reshape(-1, hidden), layer.out.t())
            wide = F.linear(self._ops.layer_norm(x, *layer.norm_2), layer.fc1, layer.fc1_bias)
            flat.addmm_(torch.ops.aten.gelu_(wide), layer.fc2.t())
        projector = self._projector
        grid = self._ops.layer_norm(x, *self._norm, self._neighbours)
        out: Tensor = projector.linear_2(projector.act(projector.linear_1(grid)))
        return out.view(num, -1, out.shape[-1])


def reason(tower: Any, config: InternVLConfig) -> str | None:
    """Why a tower is not of the kind that is fused; None: it is.

    Args:
        tower: transformers' InternVLVisionModel.
        config: the whole model's.
    """
    vision: Any = config.vision_config
    parts = (1 / config.downsample_ratio) ** 2
    checks = {
        "its norms are no layer norms": vision.norm_type != "layer_norm",
        "it norms queries and keys": vision.use_qk_norm,
        f"its activation is {vision.hidden_act}": vision.hidden_act != "gelu",
        "its features are normed once more": not isinstance(tower.layernorm, nn.Identity),
        "its features are those of an inner layer": config.vision_feature_layer != -1,
        "its first row is kept": config.vision_feature_select_strategy == "full",
        f"it joins {parts:g} neighbours": parts not in (1, 4, 16),
    }
    return next((text for text, found in checks.items() if found), None)


def _base(embeddings: Any, size: int) -> Tensor:
    """[1, 1 + P, hidden]: what x is before the patches are added: first row, bias and positions."""
    projection = embeddings.patch_embeddings.projection
    num_patches = (size // embeddings.patch_size[0]) * (size // embeddings.patch_size[1])
    first = embeddings.cls_token.detach()
    base = torch.cat((first, projection.bias.detach().expand(1, num_patches, -1)), dim=1)
    if embeddings.position_embeddings is not None:
        base = base + embeddings.interpolate_pos_encoding(base, size, size).detach()
    return base


def _pack(layer: InternVLVisionLayer, offset: Tensor) -> tuple[TowerLayer, Tensor]:
    """A layer's weights, of which the module's become views; and the offset behind it."""
    attention: Any = layer.attention
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    qkv, qkv_bias = _stack(projections, "weight"), _stack(projections, "bias")
    assert qkv is not None
    norm_1 = _norm(layer.layernorm_before, offset)
    out, offset = _scale(attention.projection_layer, layer.lambda_1, offset)
    norm_2 = _norm(layer.layernorm_after, offset)
    mlp: Any = layer.mlp
    fc2, offset = _scale(mlp.fc2, layer.lambda_2, offset)
    return TowerLayer(norm_1, qkv, qkv_bias, out, norm_2, mlp.fc1.weight.detach(), mlp.fc1.bias.detach(), fc2), offset


def _stack(projections: list[nn.Linear], name: str) -> Tensor | None:
    """Weights or biases as one tensor, of which they become views; None: there are none."""
    parts = [getattr(one, name) for one in projections]
    if parts[0] is None:
        return None
    packed = torch.cat([part.detach() for part in parts])
    for one, view in zip(projections, packed.chunk(len(parts)), strict=True):
        setattr(one, name, nn.Parameter(view, requires_grad=False))
    return packed


def _scale(linear: nn.Linear, factor: nn.Parameter, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply a layer scale into the product before it; its weight, and `offset` with its bias."""
    for name, scale in (("weight", factor[:, None]), ("bias", factor)):
        scaled = getattr(linear, name).detach() * scale.detach()
        setattr(linear, name, nn.Parameter(scaled, requires_grad=False))
    factor.data = torch.ones_like(factor)
    return linear.weight.detach(), offset + linear.bias.detach().float()


def _norm(module: Any, offset: Tensor) -> TowerNorm:
    return TowerNorm(offset, module.weight.detach(), module.bias.detach(), module.eps)


def _neighbours(side: int, ratio: float, *, transposed: bool) -> Tensor:
    """int32 [tokens, parts]: which rows of x stand side by side, by the library's pixel shuffle of their numbers."""
    numbers = 1 + torch.arange(side * side, dtype=torch.int32).view(1, side, side, 1)
    # It reads nothing of its object.
    grid: Tensor = InternVLModel.pixel_shuffle(None, numbers, scale_factor=ratio)  # type: ignore[arg-type]
    grid = grid.transpose(1, 2) if transposed else grid
    return grid.reshape(-1, grid.shape[-1]).contiguous()
