"""The tensors of a checkpoint that reads images, parted into language model and tower.

Tensors are read from the files when they are asked for, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.packed import PackedCheckpoint, packed_checkpoint
from kvarena.engine.quantization.state import PackedSource, PackedTensors, RenamedTensors, open_tensors

Tensors = dict[str, Any]


class Parted(NamedTuple):
    """A checkpoint's tensors by the native classes' names; those that no rule knows are with the language model's."""

    text: Tensors
    tower: Tensors


class Part:
    """A piece of a matrix that holds several, cut out when it is read.

    Args:
        whole: the matrix, read by `[...]`.
        cut: its rows (or what is as long as they are many) -> those of the piece.
    """

    def __init__(self, whole: Any, cut: Callable[[Tensor], Tensor]) -> None:
        self.whole = whole
        self.cut = cut

    def __getitem__(self, index: Any) -> Tensor:
        return self.cut(self.whole[...])[index]


def packed_text(text: Tensors, checkpoint: PackedCheckpoint) -> PackedTensors:
    """A language model's tensors with those that are packed as layers of their own: of InternLM2's `wqkv` the rows.

    Args:
        text: `Parted.text` of a packed checkpoint.
        checkpoint: the same.
    """
    plain: Tensors = {}
    packed: dict[str, PackedSource] = {}
    for name, value in text.items():
        whole = value.whole if isinstance(value, Part) else value
        layer = name.removesuffix(".weight")
        if not isinstance(whole, PackedSource):
            plain[name] = value
        elif isinstance(value, Part):
            packed[layer] = whole.rows_as(layer, value.cut(torch.arange(whole.entry.num_outputs)))
        else:
            packed[layer] = whole.rows_as(layer, None)
    return RenamedTensors(checkpoint, plain, packed)


def open_checkpoint(directory: Path, device: torch.device) -> Tensors:
    """The tensors of a checkpoint's files, each as something that `[...]` reads; packed ones are dequantised then.

    Args:
        directory: of the files.
        device: where packed ones are converted.

    Raises:
        ModelError: the files are not there, or a packed tensor is broken.
    """
    packed = packed_checkpoint(directory, read_config(directory))
    if packed is not None:
        return PackedTensors(packed, torch.float32, device).state()
    return open_tensors(directory)
