"""InternVL's vision tower.

uint8 [N, 3, S, S] -> values -> ViT -> without its first token -> pixel shuffle -> projector -> [N, tokens, hidden]

Computed by a fused form of transformers' modules (internvl_fused.py); towers of another kind run on the modules.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from kvarena.engine.errors import ModelError
from kvarena.engine.vision.internvl_fused import FusedTower, reason
from kvarena.engine.vision.tiles import Tiling
from kvarena.engine.vision.tower import VisionTower


class InternVLTower(VisionTower):
    """Tower and projector of transformers.

    Args:
        config: the whole model's.
        processing: how its images are cut.

    Attributes:
        fused: what computes; None: the modules.
    """

    fused: FusedTower | None

    def __init__(self, config: InternVLConfig, processing: Tiling) -> None:
        super().__init__(processing, cast(Any, config.text_config).hidden_size)
        vision: Any = config.vision_config
        vision._attn_implementation = "sdpa"
        self.vision_tower = InternVLVisionModel(vision)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.fused, self._config, self._size = None, config, processing.size
        self._layer, self._ratio = config.vision_feature_layer, config.downsample_ratio
        # One more than layers: what goes into the first one is among them.
        if not isinstance(self._layer, int) or not -vision.num_hidden_layers <= self._layer + 1 <= (
            vision.num_hidden_layers + 1
        ):
            raise ModelError(
                f"its features are those of layer {self._layer} (select_layer, vision_feature_layer), and the tower "
                f"has {vision.num_hidden_layers}"
            )
        self._keeps_first = config.vision_feature_select_strategy == "full"
        self._transposed = bool(getattr(config, "transposed_features", False))

    def fuse(self) -> None:
        """See `VisionTower.fuse`; there is a form for one kind of InternViT."""
        if reason(self.vision_tower, self._config) is None:
            self.fused = FusedTower(
                self.vision_tower, self.multi_modal_projector, self._config, transposed=self._transposed,
                values=self.values, size=self._size,
            )  # fmt: skip

    def forward(self, tiles: list[Tensor]) -> list[Tensor]:
        """See `VisionTower.forward`; all tiles are of one size."""
        batch = torch.stack(tiles)
        if self.fused is not None:
            return list(self.fused(batch))
        pixels = self.pixel_values(batch)
        out = self.vision_tower(pixel_values=pixels, output_hidden_states=self._layer != -1)
        found = out.last_hidden_state if self._layer == -1 else out.hidden_states[self._layer]
        if not self._keeps_first:
            found = found[:, 1:]
        side = int(found.shape[1] ** 0.5)
        grid = found.reshape(len(found), side, side, -1)
        # The library's own; it reads nothing of its object.
        grid = InternVLModel.pixel_shuffle(cast(Any, None), grid, scale_factor=self._ratio)
        if self._transposed:
            grid = grid.transpose(1, 2)
        return list(self.multi_modal_projector(grid.reshape(len(grid), -1, grid.shape[-1])))
