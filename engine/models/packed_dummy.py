"""A shape with random weights in few bits: what `model.load_format=dummy` makes of `model.quantization=awq`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.checkpoints.packed_entries import PackedEntry
from kvarena.engine.errors import ModelError
from kvarena.engine.models.packed_loader import PackedLoad, expert_modules, forget_packing, load_packed, plan_packed
from kvarena.engine.quantization.drawn import DrawnTensors, drawn_checkpoint, drawn_entry


def packed_shape(shape: nn.Module, name: str, method: str) -> PackedCheckpoint:
    """What a quantiser would pack of a model: linear layers but for the output head and routers, and experts.

    Args:
        shape: the model on the meta device.
        name: how messages call it.
        method: awq or gptq.

    Raises:
        ModelError: it has no layer of sizes that the method packs.
    """
    head = shape.get_output_embeddings()  # type: ignore[operator]
    entries: dict[str, PackedEntry] = {}

    def put(layer: str, num_outputs: int, num_inputs: int) -> None:
        entry = drawn_entry(layer, num_outputs, num_inputs, method)
        if entry is not None:
            entries[layer] = entry

    for layer, module in shape.named_modules():
        if type(module) is nn.Linear and module is not head and layer.rpartition(".")[2] != "gate":
            put(layer, module.out_features, module.in_features)
    for _, experts in expert_modules(shape):
        for gate, up, down in experts.names:
            put(gate, experts.inner, experts.hidden)
            put(up, experts.inner, experts.hidden)
            put(down, experts.hidden, experts.inner)
    if not entries:
        raise ModelError(
            f"{name} has no linear layer whose inputs and outputs are multiples of 8, as {method} packs them; leave "
            "model.quantization out"
        )
    return drawn_checkpoint(name, method, entries)


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
