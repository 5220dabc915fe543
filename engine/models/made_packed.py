"""Weights in few bits that no file packs: drawn so (`model.load_format=dummy model.quantization=awq`), or made of plain
ones at load (`model.quantization=int8`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.checkpoints.packed_entries import PackedEntry
from kvarena.engine.errors import ModelError
from kvarena.engine.models.packed_loader import (
    ExpertModule,
    PackedLoad,
    expert_modules,
    forget_packing,
    load_packed,
    plan_packed,
)
from kvarena.engine.quantization.drawn import DrawnTensors, drawn_checkpoint, drawn_entry
from kvarena.engine.quantization.made import MadeTensors


def packed_shape(shape: nn.Module, name: str, method: str, named: Container[str] | None = None) -> PackedCheckpoint:
    """What a quantiser would pack of a model: linear layers but for the output head and routers, and experts.

    Args:
        shape: the model on the meta device.
        name: how messages call it.
        method: one of `packed_settings.DRAWN`.
        named: names of the tensors that its files have; None: there are none, and names are the model's.

    Raises:
        ModelError: it has no such layer, of sizes that the method packs.
    """
    head, prefix = shape.get_output_embeddings(), f"{shape.base_model_prefix}."  # type: ignore[operator]
    entries: dict[str, PackedEntry] = {}

    def put(layer: str, num_outputs: int, num_inputs: int) -> None:
        entry = drawn_entry(layer, num_outputs, num_inputs, method)
        if entry is not None:
            entries[layer] = entry

    for layer, module in shape.named_modules():
        if type(module) is nn.Linear and module is not head and layer.rpartition(".")[2] != "gate":
            names = (layer, layer.removeprefix(prefix))
            stored = next((one for one in names if named is None or f"{one}.weight" in named), None)
            if stored is not None:
                put(stored, module.out_features, module.in_features)
    for _, experts in expert_modules(shape):
        for gate, up, down in _names_of(experts, named):
            put(gate, experts.inner, experts.hidden)
            put(up, experts.inner, experts.hidden)
            put(down, experts.hidden, experts.inner)
    if not entries:
        raise ModelError(
            f"{name} has no linear layer that {method} would take: of inputs and outputs that are multiples of 8, "
            "under the names of its files; leave model.quantization out"
        )
    return drawn_checkpoint(name, method, entries)


def _names_of(experts: ExpertModule, named: Container[str] | None) -> list[tuple[str, str, str]]:
    """What the projections of a module's experts are called; empty where files have them in another form."""
    if named is None:
        return experts.names
    ways = (way for way in experts.ways if all(f"{part}.weight" in named for expert in way for part in expert))
    return next(ways, [])


def made_tensors(
    shape: nn.Module, name: str, method: str, named: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> MadeTensors:
    """A plain checkpoint's tensors, quantised at load. Arguments: see `packed_shape` and `MadeTensors`."""
    return MadeTensors(packed_shape(shape, name, method, named), named, dtype, device)


def plan_dummy(
    shape: nn.Module,
    name: str,
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    stay_packed: bool,
) -> PackedLoad:
    """Which layers of a shape get packed weights, and stay so. Arguments: see `packed_shape` and `plan_packed`."""
    checkpoint = packed_shape(shape, name, method)
    biases = {
        f"{layer}.bias": module.out_features
        for layer, module in shape.named_modules()
        if layer in checkpoint.entries and isinstance(module, nn.Linear) and module.bias is not None
    }
    return plan_packed(DrawnTensors(checkpoint, biases, dtype, device, seed), shape, stay_packed=stay_packed)


def load_packed_dummy(
    load: PackedLoad, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int, **options: Any
) -> nn.Module:
    """The module, its other weights as transformers draws them. The caller's random state stays as it was.

    Args:
        load: from `plan_dummy`.
        config: of the model.
        dtype: of the model.
        device: where it goes.
        seed: of the other weights.
        options: of `from_pretrained`.
    """
    forget_packing(config)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module, info = load_packed(load, config, dtype, **options)
    surplus = sorted(info["unexpected_keys"])
    if surplus or info["mismatched_keys"]:
        found = surplus[0] if surplus else sorted(info["mismatched_keys"])[0][0]
        raise ModelError(f"{load.checkpoint.directory} has no place for a packed {found}; leave model.quantization out")
    return module
