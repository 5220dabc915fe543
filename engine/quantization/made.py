"""Weights of 8 bits that are made of plain ones at load, each when it is read.

    int8    code = round(w / scale), -127 to 127     scale = largest |w| of the output's row / 127
    fp8     code = w / scale as float8 e4m3          scale = largest |w| of the row / 448

Inputs of the products stay as they are.

Source: Dettmers et al. 2022, LLM.int8(), of which the rows' scales are; torchao's `Float8WeightOnlyConfig`, whose codes
these are bit for bit. Its `Int8WeightOnlyConfig` divides by 127.5, where the largest weight of a row lies on a tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.checkpoints.packed_entries import PackedEntry
from kvarena.engine.checkpoints.packed_settings import FP8, INT8
from kvarena.engine.quantization.state import PackedSource, PackedTensors
from kvarena.engine.quantization.weight import PackedWeight

_LARGEST = {INT8: 127.0, FP8: 448.0}


def quantise_rows(weight: Tensor, method: str) -> PackedWeight:
    """A weight [N, K] in 8 bits with a scale for each output; `method`: int8 or fp8."""
    values = weight.float()
    # A row of zeros has any scale.
    scales = (values.abs().amax(1, keepdim=True) / _LARGEST[method]).clamp(min=torch.finfo(torch.float32).tiny)
    values = values / scales  # not in place: they may be the file's own
    if method == INT8:
        codes = values.round_().clamp_(-127, 127).to(torch.int8)
    else:
        codes = values.clamp_(-448, 448).to(torch.float8_e4m3fn)
    return PackedWeight(codes, scales.t().contiguous(), None, None, weight.shape[1])


class MadeTensors(PackedTensors):
    """The tensors of a plain checkpoint, the weights of some layers quantised as they are read.

    Args:
        checkpoint: says which layers, and how.
        named: tensors by name, each read by `[...]`.
        dtype: of dequantised weights.
        device: where weights are quantised.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, named: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        names = {f"{name}.weight": name for name in checkpoint.entries}
        self.plain = {name: value for name, value in named.items() if name not in names}
        self.packed = {
            name: _MadeSource(checkpoint.entries[name], self, named[full], dtype, device)
            for full, name in names.items()
        }


class _MadeSource(PackedSource):
    def __init__(
        self, entry: PackedEntry, tensors: PackedTensors, weight: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(entry, tensors, dtype, device)
        self._weight = weight

    def load(self) -> PackedWeight:
        """Read the weight, and quantise it on the device."""
        return quantise_rows(self._weight[...].to(self._device), self._tensors.checkpoint.settings.method)
