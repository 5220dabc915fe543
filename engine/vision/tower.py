"""InternVL's vision tower: tiles of pixels to rows that stand in a prompt like token embeddings.

uint8 [N, 3, S, S] -> values -> ViT -> without its first token -> pixel shuffle -> projector -> [N, tokens, hidden]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from kvarena.engine.checkpoints.internvl import Tiling
from kvarena.engine.errors import ModelError
from kvarena.engine.vision.tiles import processor
from kvarena.engine.vision.weights import Tensors


class VisionTower(nn.Module):
    """Tower and projector of transformers, and what a pixel's byte is worth.

    Args:
        config: the whole model's.
        tiling: how its images are cut.

    Attributes:
        tiling: as given.
        hidden_size: of the language model: columns of what comes out.
    """

    values: Tensor

    def __init__(self, config: InternVLConfig, tiling: Tiling) -> None:
        super().__init__()
        vision: Any = config.vision_config
        vision._attn_implementation = "sdpa"
        self.vision_tower = InternVLVisionModel(vision)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.tiling = tiling
        self.hidden_size: int = cast(Any, config.text_config).hidden_size
        self._layer, self._ratio = config.vision_feature_layer, config.downsample_ratio
        self._keeps_first = config.vision_feature_select_strategy == "full"
        self._transposed = bool(getattr(config, "transposed_features", False))
        self.register_buffer("values", torch.from_numpy(byte_values(tiling)), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, and of what comes out."""
        return next(self.parameters()).dtype

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tiles: uint8 [N, 3, S, S].

        Returns:
            [N, tokens of a tile, hidden].
        """
        channels = torch.arange(tiles.shape[1], device=tiles.device)[:, None, None]
        pixels = self.values[channels, tiles.int()].to(self.dtype)
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
        return self.multi_modal_projector(grid.reshape(len(grid), -1, grid.shape[-1]))


def byte_values(tiling: Tiling) -> np.ndarray:
    """What each byte of each channel becomes, float32 [3, 256]: by the library's own rescaling and normalisation."""
    every = np.arange(256, dtype=np.uint8)[None, None].repeat(len(tiling.mean), 0)
    maker: Any = processor(tiling)
    scaled = maker.normalize(maker.rescale(every, maker.rescale_factor), maker.image_mean, maker.image_std)
    return np.ascontiguousarray(scaled[:, 0], dtype=np.float32)


def load_tower(
    config: InternVLConfig,
    tiling: Tiling,
    tensors: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> VisionTower:
    """The tower with its weights, each read to `device` by itself.

    Args:
        config, tiling: see `VisionTower`.
        tensors: by the native classes' names.
        dtype: of the weights there.
        device: where they go.
        name: of the checkpoint, for errors.

    Raises:
        ModelError: a weight is missing, has another shape, or has no place.
    """
    with torch.device("meta"):
        tower = VisionTower(config, tiling)
    wanted = tower.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ModelError(f"{name} lacks the weights {_first(missing)}; copy the model again")
    surplus = sorted(set(tensors) - set(wanted))
    if surplus:
        raise ModelError(
            f"{name} holds weights that its vision tower has no place for: {_first(surplus)}; config.json and weights "
            "do not belong together"
        )
    for key, place in wanted.items():
        value = tensors[key][...]
        if value.shape != place.shape:
            raise ModelError(
                f"{name}: weight {key} has shape {list(value.shape)} and config.json asks for {list(place.shape)}; "
                "config.json and weights do not belong together"
            )
        owner, _, last = key.rpartition(".")
        moved = nn.Parameter(value.to(device=device, dtype=dtype).contiguous(), requires_grad=False)
        setattr(tower.get_submodule(owner), last, moved)
    tower.values = torch.from_numpy(byte_values(tiling)).to(device)
    return tower.eval()


def dummy_tower(
    config: InternVLConfig, tiling: Tiling, dtype: torch.dtype, device: torch.device, seed: int
) -> VisionTower:
    """A tower with random weights, drawn where they will be used. The caller's random state stays as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tower = VisionTower(config, tiling)
        values = tower.values
        tower = tower.to(dtype).eval().requires_grad_(False)
        tower.values = values.to(device)
    return tower


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
