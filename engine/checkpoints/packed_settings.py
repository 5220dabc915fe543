"""How a model directory says that its weights are packed into few bits.

The settings lie in config.json (`quantization_config`, at the top, in `text_config` or in `llm_config`), or beside it
in `quantize_config.json` (AutoGPTQ) or `quant_config.json` (AutoAWQ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.directory import read_json
from kvarena.engine.errors import ConfigError, ModelError

AWQ, GPTQ, COMPRESSED = "awq", "gptq", "compressed-tensors"
# Made of plain weights at load; no file says so.
INT8, FP8 = "int8", "fp8"
MADE = (INT8, FP8)
NAMES = {AWQ: "AWQ", GPTQ: "GPTQ", COMPRESSED: "compressed-tensors", INT8: "int8", FP8: "fp8"}
# Methods that are read as a config.json calls them.
_READ = (AWQ, GPTQ, COMPRESSED)
# In which random weights are drawn.
DRAWN = (AWQ, GPTQ, *MADE)
# What transformers takes where neither is said, too.
BITS, GROUP_SIZE = 4, 128
# Files beside config.json, and what wrote them.
SIDE_FILES = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}
SECTIONS = ("text_config", "llm_config")
# Layouts of AWQ and of GPTQ; others hold the same numbers in an order of some kernel's own.
_AWQ_LAYOUTS = ("gemm",)
_GPTQ_LAYOUTS = ("gptq", "gptq_v2")
_COMPRESSED_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


@dataclass(frozen=True)
class PackedSettings:
    """How the weights are packed.

    Attributes:
        method: one of `NAMES`.
        file: where it is said.
        group_size: inputs that share a scale; None: all of them, or the tensors tell (compressed-tensors).
        zero_offset: what is added to a stored zero point: 1 for GPTQ's first format, which stores it less one.
        acts_in_order: GPTQ's `desc_act` is off, so that a `g_idx` of zeros means nothing.
        quantizes_inputs: the original also rounds the inputs of its products, which is not done here.
    """

    method: str
    file: Path
    group_size: int | None = None
    zero_offset: int = 0
    acts_in_order: bool = True
    quantizes_inputs: bool = False

    @property
    def name(self) -> str:
        """The method as people call it."""
        return NAMES[self.method]


def packed_settings(directory: Path, config: Mapping[str, Any]) -> PackedSettings | None:
    """What a model directory says of its packed weights; None where it says nothing, or names a method not read here.

    Raises:
        ModelError: a method that is read, with settings that are not.
    """
    for section in (config, *(config.get(name) for name in SECTIONS)):
        if not isinstance(section, Mapping):
            continue
        for key in ("quantization_config", "compression_config"):
            found = section.get(key)
            if isinstance(found, Mapping) and found:
                fallback = COMPRESSED if key == "compression_config" else None
                method = found.get("quant_method") or fallback or _unnamed(found)
                return _settings(directory / "config.json", method, found) if method in _READ else None
    for name, method in SIDE_FILES.items():
        file = directory / name
        if file.is_file():
            found = read_json(file)
            method = found.get("quant_method") or method
            return _settings(file, method, found) if method in _READ else None
    return None


def check_drawn(method: str | None) -> None:
    """See that random weights can be packed so; None: they are not. Raises ConfigError."""
    if method is not None and method not in DRAWN:
        raise ConfigError(
            f"model.quantization={method} insists on such weights, and model.load_format=dummy draws plain ones, or "
            f"those of {', '.join(DRAWN)}; take one of these, or leave it out"
        )


def _unnamed(found: Mapping[str, Any]) -> str | None:
    """AutoAWQ's first files named their fields and no method."""
    return AWQ if "w_bit" in found or "q_group_size" in found else None


def _settings(file: Path, method: str, found: Mapping[str, Any]) -> PackedSettings:
    if method == COMPRESSED:
        return _compressed_settings(file, found)
    bits = found.get("bits", found.get("w_bit", BITS))
    if bits != BITS:
        raise ModelError(
            f"{file} says that {NAMES[method]} packs the weights into {bits!r} bits; {BITS} bits are read: give such a "
            "checkpoint, or the unquantised one"
        )
    size = found.get("group_size", found.get("q_group_size", GROUP_SIZE))
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size >= 1):
        raise ModelError(f"{file} says group_size={size}; it must be -1 (all inputs) or at least 1")
    group_size = None if size == -1 else size
    if method == AWQ:
        layout = str(found.get("version") or "gemm").lower()
        if layout not in _AWQ_LAYOUTS:
            raise _other_layout(file, f"version={found['version']}", "gemm")
        return PackedSettings(AWQ, file, group_size)
    layout = str(found.get("checkpoint_format") or "gptq").lower()
    if layout not in _GPTQ_LAYOUTS or found.get("is_marlin_format"):
        raise _other_layout(file, f"checkpoint_format={layout if layout not in _GPTQ_LAYOUTS else 'marlin'}", "gptq")
    return PackedSettings(
        GPTQ, file, group_size, zero_offset=int(layout == "gptq"), acts_in_order=not found.get("desc_act", False)
    )


def _other_layout(file: Path, what: str, instead: str) -> ModelError:
    return ModelError(f"{file} says {what}, an order of bits that is not read; give the checkpoint in {instead}'s")


def _compressed_settings(file: Path, found: Mapping[str, Any]) -> PackedSettings:
    layout = found.get("format")
    said = found.get("config_groups")
    groups = [group for group in (said.values() if isinstance(said, Mapping) else ()) if isinstance(group, Mapping)]
    for name in (layout, *(group.get("format") for group in groups)):
        if name is not None and name not in _COMPRESSED_LAYOUTS:
            raise ModelError(
                f"{file} says format={name}, which is not read; of compressed-tensors these are: "
                f"{', '.join(_COMPRESSED_LAYOUTS)}"
            )
    return PackedSettings(
        COMPRESSED, file, quantizes_inputs=any(group.get("input_activations") for group in groups)
    )  # fmt: skip
