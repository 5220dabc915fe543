"""A model that reads images: its language model's weights, and the encoder of its images. Imported for such alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.checkpoints.images import INTERNVL, QWEN2_5, QWEN3
from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.quantization.state import PackedTensors
from kvarena.engine.vision.checkpoint import Parted, Tensors, open_checkpoint, packed_text
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.processing import Processing
from kvarena.engine.vision.processors import make_processing, processing_of
from kvarena.engine.vision.tower import VisionTower, dummy_tower, load_tower


class _Family(NamedTuple):
    """What differs between families: a class of tower, and where a checkpoint's tensors belong."""

    tower: Callable[[Any, Any], VisionTower]
    part: Callable[[Tensors, Any], Parted]


def _family(model_type: str) -> _Family:
    """Imports that family's classes alone."""
    if model_type in INTERNVL:
        from kvarena.engine.vision.internvl_tower import InternVLTower
        from kvarena.engine.vision.internvl_weights import part_tensors

        return _Family(InternVLTower, part_tensors)
    from kvarena.engine.vision.qwen_tower import Qwen3Tower, Qwen25Tower, part_qwen

    return _Family({QWEN2_5: Qwen25Tower, QWEN3: Qwen3Tower}[model_type], part_qwen)


def part_checkpoint(directory: Path, config: PretrainedConfig, device: torch.device) -> Parted:
    """The tensors of a checkpoint's files, each as something that `[...]` reads; packed ones are dequantised then.

    Args:
        directory: of the files.
        config: of the whole model.
        device: where packed ones are converted.

    Raises:
        ModelError: the files are not there, or a packed tensor is broken.
    """
    return _family(config.model_type).part(open_checkpoint(directory, device), config)


class Composite:
    """What stands beside a language model's config and weights.

    Args:
        config: of the whole model.
        directory: its files; None: `shape` says all.
        shape: the content of its config.json.
        device: where the model goes.
        has_weights: the directory's weights are read; else they are drawn.

    Attributes:
        config: the same.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        directory: Path | None,
        shape: Mapping[str, Any] | None,
        device: torch.device,
        *,
        has_weights: bool,
    ) -> None:
        self.config, self._name, self._device = config, str(directory), device
        self._processing: Processing = (
            make_processing(shape or {}, {}) if directory is None else processing_of(directory)
        )
        self._parted: Parted | None = None
        if directory is not None and has_weights:
            self._parted = part_checkpoint(directory, config, device)

    @property
    def has_grids(self) -> bool:
        """Whether positions have three dimensions in a step with images."""
        return self._processing.has_grids

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
        make = partial(_family(self.config.model_type).tower, self.config, self._processing)
        if self._parted is None:
            tower = dummy_tower(make, embed.weight.dtype, self._device, seed)
        else:
            tower = load_tower(make, self._parted.tower, embed.weight.dtype, self._device, self._name)
        return ImageEncoder(tower, embed, cache_bytes)
