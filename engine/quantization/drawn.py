"""Random packed weights for a shape that has no files: drawn as a checkpoint has them, where they will be used.

qweight   any bits                  codes 0 to 15, each as often
qzeros    7 or 8 (AWQ), 8 (GPTQ)    around the middle, so that a weight's mean is about 0
scales    0.5 to 1.5 of one value   so that a weight deviates by 0.02, as transformers draws weights
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.checkpoints.packed_entries import PACK, PackedEntry
from kvarena.engine.checkpoints.packed_settings import AWQ, GPTQ, GROUP_SIZE, INT8, MADE, PackedSettings
from kvarena.engine.checkpoints.weights import Stored
from kvarena.engine.quantization.formats import packed_weight
from kvarena.engine.quantization.state import PackedSource, PackedTensors
from kvarena.engine.quantization.weight import PackedWeight

_DEVIATION = 0.02
_OF_CODES, _OF_BYTES = 4.61, 73.6  # standard deviation of 0 to 15, and of -127 to 127
_SEVENS, _ONES = 0x77777777, 0x11111111


def drawn_entry(name: str, num_outputs: int, num_inputs: int, method: str) -> PackedEntry | None:
    """A linear layer as `method` would pack it, 4 bits in groups of 128; None where it does not take such sizes."""
    if method in MADE:
        dtype = "I8" if method == INT8 else "F8_E4M3"
        made = {"weight": (dtype, (num_outputs, num_inputs)), "weight_scale": ("F32", (num_outputs, 1))}
        parts = {suffix: Stored(f"{name}.{suffix}", Path(), *stored) for suffix, stored in made.items()}
        return PackedEntry(name, parts, num_outputs, num_inputs, 1, num_inputs, 8)
    if num_outputs % PACK or num_inputs % PACK:
        return None
    group_size = min(GROUP_SIZE, num_inputs)
    groups = -(-num_inputs // group_size)
    shapes = {
        "qweight": (num_inputs, num_outputs // PACK) if method == AWQ else (num_inputs // PACK, num_outputs),
        "qzeros": (groups, num_outputs // PACK),
        "scales": (groups, num_outputs),
    }
    parts = {
        suffix: Stored(f"{name}.{suffix}", Path(), "F16" if suffix == "scales" else "I32", shape)
        for suffix, shape in shapes.items()
    }
    return PackedEntry(name, parts, num_outputs, num_inputs, groups, group_size)


def drawn_checkpoint(name: str, method: str, entries: Mapping[str, PackedEntry]) -> PackedCheckpoint:
    """What stands for the files of a shape called `name`; `method`: awq or gptq."""
    settings = PackedSettings(method, Path("model.quantization"), GROUP_SIZE, zero_offset=int(method == GPTQ))
    return PackedCheckpoint(Path(name), settings, {}, entries)


class DrawnTensors(PackedTensors):
    """The tensors of a drawn checkpoint.

    Args:
        checkpoint: from `drawn_checkpoint`.
        biases: of its layers, as long as their outputs are many; they are 0.
        dtype: of dequantised weights.
        device: where weights are drawn.
        seed: of all of them.
    """

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        biases: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self.plain = {name: torch.zeros(length, dtype=dtype) for name, length in biases.items()}
        self.packed = {
            name: _DrawnSource(entry, self, dtype, device, seed) for name, entry in checkpoint.entries.items()
        }


class _DrawnSource(PackedSource):
    def __init__(
        self, entry: PackedEntry, tensors: PackedTensors, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        super().__init__(entry, tensors, dtype, device)
        # 32 bits are all that a generator of a CPU takes in.
        self._seed = zlib.crc32(f"{seed} {entry.name}".encode())

    def load(self) -> PackedWeight:
        """Draw it, on the device. The same each time, in whichever order layers are asked for."""
        settings = self._tensors.checkpoint.settings
        generator = torch.Generator(self._device).manual_seed(self._seed)
        parts = {name: self._draw(part, settings.method, generator) for name, part in self.entry.parts.items()}
        return packed_weight(self.entry, settings, parts, self.inputs)

    def _draw(self, part: Stored, method: str, generator: torch.Generator) -> Tensor:
        shape, device = part.shape, self._device
        if part.dtype in ("I8", "F8_E4M3", "F32"):
            return self._draw_eight(part, method, generator)
        if part.dtype == "F16":
            drawn = torch.rand(shape, generator=generator, device=device)
            return ((drawn + 0.5) * (_DEVIATION / _OF_CODES)).half()
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).int()
        if part.name.endswith(".qweight"):
            return bits
        return (bits & _ONES) + _SEVENS if method == AWQ else torch.full_like(bits, _SEVENS)

    def _draw_eight(self, part: Stored, method: str, generator: torch.Generator) -> Tensor:
        shape, device = part.shape, self._device
        if part.dtype == "F32":
            drawn = torch.rand(shape, generator=generator, device=device)
            return (drawn + 0.5) * (_DEVIATION / (_OF_BYTES if method == INT8 else 1))
        if part.dtype == "I8":
            return torch.randint(-127, 128, shape, generator=generator, device=device).to(torch.int8)
        return torch.randn(shape, generator=generator, device=device).to(torch.float8_e4m3fn)
