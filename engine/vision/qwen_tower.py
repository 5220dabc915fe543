"""The vision towers of Qwen2.5-VL and Qwen3-VL: images of any size side by side, each by itself in attention.

uint8 [3, h, w] -> values -> patches [n, 3 * frames * p * p], a token's side by side -> blocks -> merger

    Qwen2.5-VL   most blocks attend within windows of 8 x 8 patches, some over the whole image
    Qwen3-VL     a learned position beside the turned ones; some blocks' streams are merged too: the deep levels
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    Qwen2_5_VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, Qwen3VLVisionRotaryEmbedding
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from kvarena.engine.vision.checkpoint import Parted, Tensors
from kvarena.engine.vision.patches import Patching
from kvarena.engine.vision.tower import VisionTower


class Segments(NamedTuple):
    """Which patches attend to one another: those of a segment, and no others.

    Attributes:
        groups: int64 [count, length], patches of all segments of one length; None where that is one segment of all.
    """

    groups: list[Tensor | None]

    @classmethod
    def of(cls, ends: Tensor, device: torch.device) -> Segments:
        """From the segments' bounds, int [count + 1] on the host, in order."""
        bounds = ends.tolist()
        by_length: dict[int, list[int]] = {}
        for begin, end in pairwise(bounds):
            by_length.setdefault(end - begin, []).append(begin)
        if len(bounds) == 2:
            return cls([None])
        return cls(
            [
                (torch.tensor(begins)[:, None] + torch.arange(length)).to(device, non_blocking=True)
                for length, begins in by_length.items()
            ]
        )


class SegmentAttention(Qwen2_5_VLVisionAttention):
    """The library's attention of both towers, with one product for all segments of a length in place of one each."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Attend within segments.

        Args:
            hidden_states: [patches, dim].
            cu_seqlens: `Segments`, handed through by the library as what it calls so.
            position_embeddings: cosines and sines.
            max_seqlen, kwargs: of no use here.
        """
        del max_seqlen, kwargs
        segments: Segments = cu_seqlens
        assert position_embeddings is not None
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        out = torch.empty_like(v)
        for group in segments.groups:
            # [segments, heads, patches, head_dim]; all patches are one segment where there is no group
            of_q, of_k, of_v = (x[group].transpose(1, 2) for x in (q, k, v))
            out[group] = F.scaled_dot_product_attention(of_q, of_k, of_v, scale=self.scaling).transpose(1, 2)
        return self.proj(out.flatten(-2))


class QwenTower(VisionTower):
    """What both generations share.

    Args:
        visual: the library's tower.
        rotation: class of its rotary embedding.
        processing: how images are resized and cut.
        hidden_size: of the language model.
        num_levels: see `VisionTower`.
    """

    def __init__(
        self, visual: Any, rotation: type[nn.Module], processing: Patching, hidden_size: int, num_levels: int = 0
    ) -> None:
        super().__init__(processing, hidden_size, num_levels)
        self.visual = visual
        self._rotation = rotation
        self._cutting = processing
        for block in visual.blocks:
            block.attn = SegmentAttention(visual.config)

    def restore(self, device: torch.device) -> None:
        """See `VisionTower.restore`."""
        super().restore(device)
        self.visual.rotary_pos_emb = self._rotation(self.visual.config).to(device)

    def patches(self, tile: Tensor) -> Tensor:
        """The patches of a picture in the tower's order, as the library's processor lays them out.

        Args:
            tile: uint8 [3, h, w].

        Returns:
            [patches, 3 * frames * p * p].
        """
        made = self._cutting
        side, merge, frames = made.patch_size, made.merge_size, made.temporal_patch_size
        values = self.pixel_values(tile)
        cut = values.unflatten(2, (-1, merge, side)).unflatten(1, (-1, merge, side))
        # [3, rows, merge, p, columns, merge, p] -> [rows, columns, merge, merge, 3, frames, p, p]
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, frames, -1, -1)
        return cut.reshape(-1, 3 * frames * side * side)

    def forward(self, tiles: list[Tensor]) -> list[Tensor]:
        """See `VisionTower.forward`."""
        side, merge = self._cutting.patch_size, self._cutting.merge_size
        grid = torch.tensor([[1, tile.shape[1] // side, tile.shape[2] // side] for tile in tiles])
        device = tiles[0].device
        # On the host, so that nobody waits for the device to learn a length.
        given = self.plan(grid, device) | {
            "position_ids": get_vision_position_ids(grid, merge).to(device, non_blocking=True),
            "cu_seqlens": Segments.of(get_vision_cu_seqlens(grid), device),
        }
        out = self.visual(torch.cat([self.patches(tile) for tile in tiles]), grid_thw=grid, **given)
        made = torch.cat([out.pooler_output, *self.deep_features(out)], dim=-1)
        return list(made.split((grid.prod(-1) // merge**2).tolist()))

    def plan(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """What this tower needs beside what both need; `grid`: int64 [images, 3] on the host, patches by axis."""
        raise NotImplementedError

    def deep_features(self, out: Any) -> Sequence[Tensor]:  # noqa: ARG002
        """The levels in the library's output, each [tokens, hidden]."""
        return ()


class Qwen25Tower(QwenTower):
    """Qwen2.5-VL's. Arguments: see `InternVLTower`."""

    def __init__(self, config: Qwen2_5_VLConfig, processing: Patching) -> None:
        text, vision = _parts(config)
        visual = Qwen2_5_VisionTransformerPretrainedModel(vision)
        super().__init__(visual, Qwen2_5_VLVisionRotaryEmbedding, processing, text.hidden_size)

    def plan(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """The order of patches by window, and the windows' bounds."""
        visual: Any = self.visual
        index, ends = get_vision_window_index(grid, visual.spatial_merge_size, visual.window_size, visual.patch_size)
        return {
            "window_index": index.to(device, non_blocking=True),
            "cu_window_seqlens": Segments.of(ends, device),
        }


class Qwen3Tower(QwenTower):
    """Qwen3-VL's. Arguments: see `InternVLTower`."""

    def __init__(self, config: Qwen3VLConfig, processing: Patching) -> None:
        text, vision = _parts(config)
        visual: Any = Qwen3VLVisionModel(vision)
        levels = len(vision.deepstack_visual_indexes)
        super().__init__(visual, Qwen3VLVisionRotaryEmbedding, processing, text.hidden_size, levels)

    def plan(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """Where in the table of learned positions each patch lies."""
        visual: Any = self.visual
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners,
            visual.spatial_merge_size,
        )  # fmt: skip
        return {
            "interp_indices": indices.to(device, non_blocking=True),
            "interp_weights": weights.to(device, non_blocking=True),
        }

    def deep_features(self, out: Any) -> Sequence[Tensor]:
        """See `QwenTower.deep_features`."""
        return out.deepstack_features


def _parts(config: PretrainedConfig) -> tuple[Any, Any]:
    """The configs of language model and tower."""
    vision: Any = config.vision_config
    vision._attn_implementation = "sdpa"
    return config.text_config, vision


def part_qwen(tensors: Tensors, config: PretrainedConfig) -> Parted:
    """Sort a checkpoint's tensors by where they belong; `config` says nothing of it.

    visual.*                 as Qwen2.5-VL is published                       -> visual.*
    model.*, lm_head         the same                                         -> the same
    model.visual.*           as Qwen3-VL is, and as transformers 5 saves both -> visual.*
    model.language_model.*   the same                                         -> model.*
    """
    del config
    parted = Parted({}, {})
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.") if name.startswith("model.visual.") else name
        if plain.startswith("visual."):
            parted.tower[plain] = tensor
        else:
            parted.text[name.replace("model.language_model.", "model.", 1)] = tensor
    return parted
