"""Loads a checkpoint with packed weights through transformers, which never hears of the packing.

    on a CPU    every packed layer is dequantised while it is read
    on a GPU    linear layers and experts stay packed (`PackedLinear`, `PackedExperts`); what lies in other modules, and
                what no kernel takes, is dequantised

Either way transformers gets names and shapes of a model that is not quantised, or of one with these modules in place of
its own, and the tensors by name: so renamings and conversions of its own hold here too.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.checkpoints.packed import PackedCheckpoint
from kvarena.engine.pool.memory_limits import size_text
from kvarena.engine.quantization.experts import PARTS, ExpertSources, PackedExperts, can_stack
from kvarena.engine.quantization.linear import PackedLinear
from kvarena.engine.quantization.state import PackedSource, PackedTensors

_SETTINGS = ("quantization_config", "compression_config")
# An expert's gate, up and down in the files: everyone's names, and Mixtral's.
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]


@dataclass(frozen=True)
class PackedLoad:
    """What is to be read of a packed checkpoint.

    Attributes:
        checkpoint: which.
        model_class: of transformers.
        tensors: its tensors.
        layers: linear layers of the model that stay packed, by their name in the model, with their name in the files.
        experts: modules of experts that stay packed, by their name in the model.
    """

    checkpoint: PackedCheckpoint
    model_class: type[nn.Module]
    tensors: PackedTensors
    layers: dict[str, str] = field(default_factory=dict)
    experts: dict[str, list[ExpertSources]] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, str]:
        """Every layer that stays packed, by its name in the files, with the name of its `PackedLinear` in the model."""
        kept = {stored: name for name, stored in self.layers.items()}
        for name, sources in self.experts.items():
            for index, expert in enumerate(sources):
                for part, source in zip(PARTS, expert, strict=True):
                    kept[source.entry.name] = f"{name}.{index}.{part}"
        return kept

    def saved_bytes(self, dtype: torch.dtype) -> int:
        """Memory that the layers that stay packed take less than in `dtype`."""
        entries = [self.checkpoint.entries[name] for name in self.kept]
        return sum(entry.num_outputs * entry.num_inputs * dtype.itemsize - entry.num_bytes for entry in entries)

    @property
    def summary(self) -> str:
        """How the weights are packed, and whether they stay so, in a few words."""
        kept, packed = len(self.kept), len(self.checkpoint.entries)
        end = "" if kept == packed else ", dequantised" if not kept else f", {packed - kept} of {packed} dequantised"
        return self.checkpoint.describe() + end

    def describe(self) -> str:
        """How the weights are packed and what becomes of them, for a line at the start."""
        packed, here = len(self.checkpoint.entries), len(self.kept)
        text = f"{packed} weights in {self.checkpoint.describe()} ({size_text(self.checkpoint.num_bytes)})"
        if not here:
            text += ", dequantised at load"
        elif here < packed:
            text += f", {packed - here} of them dequantised at load: no kernel takes them where they are"
        if self.checkpoint.settings.quantizes_inputs:
            text += "; inputs of the products, which its original rounds, are not"
        return text


def plan_packed(tensors: PackedTensors, shape: nn.Module, *, stay_packed: bool) -> PackedLoad:
    """See which layers stay packed.

    Args:
        tensors: of the checkpoint.
        shape: the model on the meta device.
        stay_packed: keep linear layers packed where kernels take them.
    """
    checkpoint = tensors.checkpoint
    load = PackedLoad(checkpoint, type(shape), tensors)
    if stay_packed:
        from kvarena.engine.kernels.gemm.packed import packed_tile

        for name, stored in linear_layers(shape, checkpoint).items():
            source, entry = load.tensors.packed[stored], checkpoint.entries[stored]
            if source.is_even and packed_tile(1, entry.num_inputs, entry.group_size) is not None:
                load.layers[name] = stored
        for name, sources in _experts(shape, load.tensors.packed):
            sizes = {(source.entry.num_inputs, source.entry.group_size) for source in itertools.chain(*sources)}
            if can_stack(sources) and all(packed_tile(1, *size) is not None for size in sizes):
                load.experts[name] = sources
    return load


class ExpertModule(NamedTuple):
    """A module of experts as two parameters: gate and up [E, 2 I, H], down [E, H, I]."""

    num_experts: int
    hidden: int
    inner: int
    ways: list[list[tuple[str, str, str]]]

    @property
    def names(self) -> list[tuple[str, str, str]]:
        """Each expert's gate, up and down in the files, as the model's makers call them."""
        return self.ways[0]


def expert_modules(model: nn.Module) -> Iterator[tuple[str, ExpertModule]]:
    """Modules of experts by name, with the `ways` in which files may call their projections, the usual one first."""
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if set(parameters) != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
            continue
        if list(inspect.signature(module.forward).parameters) != _EXPERT_ARGUMENTS:
            continue
        (count, both, hidden), down_shape = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
        if tuple(down_shape) != (count, hidden, both // 2):
            continue
        places = (name, name.replace(".mlp.", ".block_sparse_moe."))
        ways = [
            [(f"{stored}.{index}.{gate}", f"{stored}.{index}.{up}", f"{stored}.{index}.{down}")
             for index in range(count)]
            for (gate, up, down), stored in itertools.product(_EXPERT_NAMES, places)
        ]  # fmt: skip
        # Mixtral's own names are the last.
        is_mixtral = "mixtral" in type(model).__name__.lower()
        yield name, ExpertModule(count, hidden, both // 2, ways[::-1] if is_mixtral else ways)


def _experts(model: nn.Module, packed: dict[str, PackedSource]) -> Iterator[tuple[str, list[ExpertSources]]]:
    """Modules of experts that are packed."""
    for name, module in expert_modules(model):
        for way in module.ways:
            rows = [[packed.get(part) for part in expert] for expert in way]
            found = [ExpertSources(*row) for row in rows if None not in row]  # type: ignore[arg-type]
            sizes = {tuple(source.get_shape()) for expert in found for source in (expert.gate, expert.up)}
            if len(found) == module.num_experts and sizes == {(module.inner, module.hidden)}:
                yield name, found
                break


def linear_layers(model: nn.Module, checkpoint: PackedCheckpoint) -> dict[str, str]:
    """Linear layers of a model that the checkpoint packs, with their names there, where a prefix may be left out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, module in model.named_modules():
        stored = name if name in checkpoint.entries else name.removeprefix(prefix)
        entry = checkpoint.entries.get(stored)
        if type(module) is not nn.Linear or entry is None:
            continue
        if (entry.num_outputs, entry.num_inputs) == (module.out_features, module.in_features):
            found[name] = stored
    return found


def forget_packing(config: PretrainedConfig) -> None:
    """Take out of a config what it says of quantisation: transformers would ask for packages of its own."""
    for section in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in _SETTINGS:
            if hasattr(section, name):
                delattr(section, name)


def load_packed(
    load: PackedLoad, config: PretrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The module and transformers' report of missing, unexpected and mismatched keys.

    Args:
        load: from `plan_packed`.
        config: of the model, of which `forget_packing` has been asked.
        dtype: of the model.
        options: of `from_pretrained`.
    """
    found: Any = _class_of(load)
    module, info = found.from_pretrained(
        None, config=config, state_dict=load.tensors.state(load.kept), dtype=dtype, **options
    )
    module.__class__ = load.model_class
    incomplete = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    for name in load.experts:
        if not any(key.startswith(f"{name}.") for key in incomplete):
            module.get_submodule(name).stack()
    zeros = load.tensors.zero_biases() if info["unexpected_keys"] else set()
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if key not in zeros}
    return module, info


def _class_of(load: PackedLoad) -> type[nn.Module]:
    """The model's class, whose layers become packed ones as soon as they are made: before anything is read.

    transformers makes the model without memory, and asks it which tensors it expects.
    """
    model_class = load.model_class
    if not load.kept:
        return model_class

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        for name, stored in load.layers.items():
            parent, _, child = name.rpartition(".")
            place = self.get_submodule(parent)
            setattr(place, child, PackedLinear(load.tensors.packed[stored], getattr(place, child).bias))
        for name, sources in load.experts.items():
            parent, _, child = name.rpartition(".")
            place = self.get_submodule(parent)
            setattr(place, child, PackedExperts(sources, getattr(place, child).act_fn))

    return type(model_class.__name__, (model_class,), {"__init__": make, "__module__": model_class.__module__})
