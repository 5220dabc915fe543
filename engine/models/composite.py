"""A model that reads images: its language model's weights, and the encoder of its images. Imported for such alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig

from kvarena.engine.checkpoints.internvl import tiling, tiling_of
from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.quantization.state import PackedTensors
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.tower import VisionTower, dummy_tower, load_tower
from kvarena.engine.vision.weights import Parted, packed_text, part_checkpoint


class Composite:
    """What stands beside a language model's config and weights.

    Args:
        config: of the whole model.
        directory: its files; None: `shape` says all.
        shape: the content of its config.json.
        device: where the model goes.
        has_weights: the directory's weights are read; else they are drawn.
    """

    def __init__(
        self,
        config: InternVLConfig,
        directory: Path | None,
        shape: Mapping[str, Any] | None,
        device: torch.device,
        *,
        has_weights: bool,
    ) -> None:
        self._config, self._directory, self._device = config, directory, device
        self._tiling = tiling(shape or {}, {}) if directory is None else tiling_of(directory)
        self._parted: Parted | None = None
        if directory is not None and has_weights:
            self._parted = part_checkpoint(directory, config, device)

    @property
    def text(self) -> dict[str, Any]:
        """The language model's tensors by name, each read by `[...]`; they were not drawn."""
        assert self._parted is not None
        return self._parted.text

    def packed(self, checkpoint: PackedCheckpoint) -> PackedTensors:
        """The language model's tensors of `checkpoint`, whose weights are packed and were not drawn."""
        assert self._parted is not None
        return packed_text(self._parted.text, checkpoint)

    def encoder(self, module: nn.Module, seed: int, cache_bytes: int) -> ImageEncoder:
        """The encoder beside `module`, the language model, in its dtype. Raises ModelError."""
        embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        return ImageEncoder(self._tower(embed.weight.dtype, seed), embed, cache_bytes)

    def _tower(self, dtype: torch.dtype, seed: int) -> VisionTower:
        if self._parted is None:
            return dummy_tower(self._config, self._tiling, dtype, self._device, seed)
        return load_tower(self._config, self._tiling, self._parted.tower, dtype, self._device, str(self._directory))
