"""Checkpoints whose weights are packed into few bits, and which of their linear layers are.

Which layers are packed is told by the tensors of the files alone: lists such as `modules_to_not_convert: ["gate"]` mean
one layer or another, as their reader pleases.

Headers are read, weights not, and torch is not needed: a server's supervisor judges a checkpoint in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.kinds import METHODS, quantization
from kvarena.engine.checkpoints.packed_entries import PackedEntry, compressed_entries, gptq_entries
from kvarena.engine.checkpoints.packed_settings import (
    COMPRESSED,
    MADE,
    SIDE_FILES,
    PackedSettings,
    check_drawn,
    packed_settings,
)
from kvarena.engine.checkpoints.weights import Stored, read_headers, weight_files
from kvarena.engine.errors import ModelError


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint with packed weights.

    Attributes:
        directory: where it lies.
        settings: how it is packed.
        headers: every tensor of its files by name.
        entries: the packed linear layers by name.
    """

    directory: Path
    settings: PackedSettings
    headers: Mapping[str, Stored]
    entries: Mapping[str, PackedEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of packed layers, but for their biases."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def describe(self) -> str:
        """AWQ, 4 bits in groups of 128, and the like."""
        if self.settings.method in MADE:
            return f"{self.settings.name} with a scale for each output"
        kinds = sorted({entry.kind for entry in self.entries.values()})
        return f"{self.settings.name}, {' and '.join(kinds)}"


def packed_checkpoint(directory: Path, config: Mapping[str, Any]) -> PackedCheckpoint | None:
    """The packed layers of a model directory; None where nothing is packed in a way that is read here.

    A file beside config.json counts for nothing where no tensor is packed: such ones are left behind.

    Raises:
        ModelError: settings that are not read, a tensor that is missing or misshapen, or none that is packed.
    """
    settings = packed_settings(directory, config)
    if settings is None:
        return None
    files = weight_files(directory)
    if any(file.suffix != ".safetensors" for file in files):
        raise ModelError(
            f"{directory} holds {settings.name} weights in {files[0].name}; packed weights are read from "
            "model.safetensors alone: give that checkpoint"
        )
    headers = read_headers(files)
    make = compressed_entries if settings.method == COMPRESSED else gptq_entries
    entries = make(settings, headers)
    if not entries and settings.file.name in SIDE_FILES:
        return None
    if not entries:
        what = "weight_packed" if settings.method == COMPRESSED else "qweight"
        raise ModelError(
            f"{settings.file} says that the weights are quantised with {settings.name}, and {files[0].name} holds no "
            f"packed one (a tensor ...{what}); take quantization_config out of it, or copy the packed files"
        )
    return PackedCheckpoint(directory, settings, headers, entries)


def check_method(directory: Path, config: Mapping[str, Any], wanted: str, *, weights: bool) -> None:
    """See that a checkpoint is quantised as its user insists.

    Args:
        directory: the checkpoint's.
        config: its config.json.
        wanted: the method, as a `quantization_config` calls it; or int8 or fp8, to be made of plain weights.
        weights: its weights will be read; random ones are drawn as they are wanted.

    Raises:
        ModelError: it is not, or another method is meant.
        ConfigError: random weights are not drawn so.
    """
    if not weights:
        check_drawn(wanted)
        return
    settings = packed_settings(directory, config)
    packed = None if settings is None else packed_checkpoint(directory, config)
    found = packed.settings.method if packed is not None else quantization(dict(config))
    if found is None and wanted in MADE:
        return
    if found != wanted:
        what = "are not quantised" if found is None else f"are quantised with {METHODS.get(found, found)}"
        raise ModelError(
            f"model.quantization={wanted}, and the weights of {directory} {what}; leave model.quantization out, or "
            "give such a checkpoint"
        )
