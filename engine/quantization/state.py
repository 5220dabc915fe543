"""A packed checkpoint's tensors by name, each read when it is asked for.

    file                                    here
    model.norm.weight                       the same: a slice of the file
    x.qweight, x.qzeros, x.scales, x.g_idx  x.weight: a `PackedSource`, dequantised by `source[...]`
                                            or x.codes, x.scales, x.zeros, x.order: its parts, for a `PackedLinear`

Both are what transformers takes as `state_dict`: it reads an entry by `[...]`, in threads of its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.checkpoints.packed_entries import PackedEntry
from kvarena.engine.checkpoints.weights import Stored, weight_files
from kvarena.engine.quantization.formats import InputOrder, packed_weight
from kvarena.engine.quantization.weight import PackedWeight

PARTS = ("codes", "scales", "zeros", "order")


def open_tensors(directory: Path) -> dict[str, Any]:
    """The tensors of a directory that packs none, by name, each read by `[...]`. Raises ModelError: none are there."""
    tensors: dict[str, Any] = {}
    for file in weight_files(directory):
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        else:
            tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return tensors


class PackedTensors:
    """The tensors of a packed checkpoint.

    Args:
        checkpoint: which.
        dtype: of dequantised weights.
        device: where weights are converted and dequantised.

    Attributes:
        checkpoint: the same.
        plain: tensors that are not packed, as slices of their files.
        packed: packed layers by name.

    Raises:
        ModelError: the file gives an input a group that its layer has not.
    """

    def __init__(self, checkpoint: PackedCheckpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}
        parts = {part.name for entry in checkpoint.entries.values() for part in entry.parts.values()}
        self.plain = {name: self.slice_of(one) for name, one in checkpoint.headers.items() if name not in parts}
        self.packed = {
            name: PackedSource(entry, self, dtype, torch.device(device)) for name, entry in checkpoint.entries.items()
        }

    def slice_of(self, stored: Stored) -> Any:
        """The tensor as a slice of its file, which nothing reads yet."""
        key = str(stored.file)
        if key not in self._files:
            self._files[key] = safe_open(key, framework="pt", device="cpu")
        return self._files[key].get_slice(stored.name)

    def of_rank(self, plain: dict[str, Any], packed: Mapping[str, PackedSource]) -> PackedTensors:
        """The same for a model that has parts of the tensors.

        Args:
            plain: its tensors that are not packed.
            packed: its packed layers by name.
        """
        found = copy.copy(self)
        entries = {name: source.entry for name, source in packed.items()}
        found.checkpoint = replace(self.checkpoint, entries=entries)
        found.plain, found.packed = plain, dict(packed)
        return found

    def state(self, kept: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What transformers takes as `state_dict`.

        Args:
            kept: layers whose weights stay packed, by their name here, with the name of their `PackedLinear` in the
                model; others are dequantised as they are read.
        """
        state, kept = dict(self.plain), kept or {}
        for name, source in self.packed.items():
            if name in kept:
                state |= {f"{kept[name]}.{part}": _Part(source, part) for part in source.part_names}
            else:
                state[f"{name}.weight"] = source
        return state

    def zero_biases(self) -> set[str]:
        """Biases of packed layers that are all 0, which AutoGPTQ writes for layers that have none."""
        names = [f"{name}.bias" for name in self.packed]
        return {name for name in names if name in self.plain and not self.plain[name][...].any()}


class PackedSource:
    """A packed layer in its file.

    Args:
        entry: which.
        tensors: of its checkpoint.
        dtype: of the dequantised weight.
        device: where it is converted and dequantised.

    Raises:
        ModelError: see `PackedTensors`.
    """

    def __init__(self, entry: PackedEntry, tensors: PackedTensors, dtype: torch.dtype, device: torch.device) -> None:
        self.entry = entry
        self._tensors, self._dtype, self._device = tensors, dtype, device
        stored = entry.parts.get("g_idx") or entry.parts.get("weight_g_idx")
        indices = None if stored is None else tensors.slice_of(stored)[...]
        self.inputs = InputOrder(entry, tensors.checkpoint.settings, indices)
        self._lock = threading.Lock()
        self._loaded: PackedWeight | None = None
        self._asked = 0

    @property
    def part_names(self) -> list[str]:
        """The parts of its packed weight that are there."""
        absent = set() if self._has_zeros else {"zeros"}
        if self.inputs.order is None:
            absent.add("order")
        return [name for name in PARTS if name not in absent]

    @property
    def is_even(self) -> bool:
        """Whether kernels can multiply it: all groups are of one size."""
        return self.inputs.row_groups is None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of its scales, as the file has them."""
        stored = self.entry.parts.get("scales") or self.entry.parts["weight_scale"]
        return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[stored.dtype]

    def load(self) -> PackedWeight:
        """Read and convert it, on the device."""
        parts = {
            suffix: self._tensors.slice_of(stored)[...].to(self._device)
            for suffix, stored in self.entry.parts.items()
            if suffix not in ("weight_shape", "g_idx", "weight_g_idx", "input_scale")
        }
        return packed_weight(self.entry, self._tensors.checkpoint.settings, parts, self.inputs)

    def part(self, name: str) -> Tensor:
        """One of `part_names`; the weight is converted for the first and forgotten with the last."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self.load()
            part = getattr(self._loaded, name)
            self._asked += 1
            if self._asked == len(self.part_names):
                self._loaded, self._asked = None, 0
        assert isinstance(part, Tensor)
        return part

    def get_shape(self) -> list[int]:
        """As a slice of a file: [N, K]."""
        return [self.entry.num_outputs, self.entry.num_inputs]

    def get_dtype(self) -> str:
        """As a slice of a file: what its scales are."""
        return (self.entry.parts.get("scales") or self.entry.parts["weight_scale"]).dtype

    def rows_as(self, name: str, rows: Tensor | None) -> PackedSource:
        """Some of its outputs as a layer of their own, called `name`. `rows`: int64; None: all of them."""
        return _Rows(self, name, rows)

    def __getitem__(self, index: Any) -> Tensor:
        """The dequantised weight, or a part of it."""
        return self.load().dequantize(self._dtype)[index]

    @property
    def _has_zeros(self) -> bool:
        parts, weight = self.entry.parts, self.entry.parts.get("weight")
        return "qzeros" in parts or ("weight_zero_point" in parts and (weight is None or weight.dtype == "I8"))


class _Rows(PackedSource):
    """Outputs of a packed layer that the model has in several: read with the whole, and chosen."""

    def __init__(self, whole: PackedSource, name: str, rows: Tensor | None) -> None:
        num_outputs = whole.entry.num_outputs if rows is None else len(rows)
        share = whole.entry.share * num_outputs / whole.entry.num_outputs
        self.entry = replace(whole.entry, name=name, num_outputs=num_outputs, share=share)
        self._whole, self._rows = whole, rows
        self._tensors, self._dtype, self._device = whole._tensors, whole._dtype, whole._device
        self.inputs = whole.inputs
        self._lock = threading.Lock()
        self._loaded: PackedWeight | None = None
        self._asked = 0

    def load(self) -> PackedWeight:
        """Read and convert it, on the device."""
        weight = self._whole.load()
        return weight if self._rows is None else weight.select_rows(self._rows.to(weight.codes.device))


class RenamedTensors(PackedTensors):
    """Tensors of a packed checkpoint under other names, some of them parts of what lies in the files.

    Args:
        checkpoint: of the files.
        plain: tensors that are not packed, by their new names.
        packed: packed layers by their new names.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, plain: Mapping[str, Any], packed: Mapping[str, PackedSource]
    ) -> None:
        entries = {name: source.entry for name, source in packed.items()}
        self.checkpoint = replace(checkpoint, entries=entries)
        self.plain, self.packed = dict(plain), dict(packed)


class _Part:
    """A part of a packed weight, to be read."""

    def __init__(self, source: PackedSource, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._source.part(self._name)[index]


class PackedShare(PackedSource):
    """What a rank has of a packed layer: some outputs, or some inputs. Read with the whole, and cut.

    Inputs stay packed where they are whole groups in the order of the files; others are dequantised when they are cut.

    Args:
        whole: the layer.
        name: of the part.
        outputs, inputs: which.
    """

    def __init__(self, whole: PackedSource, name: str, outputs: slice, inputs: slice) -> None:
        entry = whole.entry
        num_outputs, num_inputs = outputs.stop - outputs.start, inputs.stop - inputs.start
        num_groups, group_size = entry.num_groups, entry.group_size
        self._whole, self._outputs, self._inputs = whole, outputs, inputs
        self._tensors, self._dtype, self._device = whole._tensors, whole._dtype, whole._device
        self.inputs = copy.copy(whole.inputs)
        self._is_cut = num_inputs < entry.num_inputs
        if self._is_cut:
            step = group_size if num_groups > 1 else 8
            self._fits = whole.is_even and self.inputs.order is None and not (inputs.start % step or num_inputs % step)
            num_groups = num_inputs // group_size if num_groups > 1 else 1
            group_size = min(group_size, num_inputs)
        else:
            self._fits = whole.is_even
        share = entry.share * num_outputs * num_inputs / (entry.num_outputs * entry.num_inputs)
        self.entry = replace(
            entry, name=name, num_outputs=num_outputs, num_inputs=num_inputs, num_groups=max(1, num_groups),
            group_size=group_size, share=share,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._loaded: PackedWeight | None = None
        self._asked = 0

    @property
    def is_even(self) -> bool:
        """See `PackedSource.is_even`: a cut through a group is not."""
        return self._fits

    def load(self) -> PackedWeight:
        """See `PackedSource.load`; of a part that is even."""
        weight = self._whole.load().select_rows(self._outputs)
        return weight.select_inputs(self._inputs) if self._is_cut else weight

    def __getitem__(self, index: Any) -> Tensor:
        """The dequantised part, or a part of it."""
        weight = self._whole.load().select_rows(self._outputs)
        return weight.dequantize(self._dtype)[:, self._inputs][index]
