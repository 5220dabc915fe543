"""A model's sizes without its weights: what the simulator needs to know of it.

The module is built on the meta device, where tensors have shapes and no memory, and its layers are traced there. So
every model that the loader drives has sizes, and a 13B model takes no more memory than a small one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.kinds import quantization
from kvarena.engine.checkpoints.packed import PackedCheckpoint, packed_checkpoint
from kvarena.engine.checkpoints.packed_settings import check_drawn
from kvarena.engine.models.building import build_dummy
from kvarena.engine.models.configs import (
    end_and_special_tokens,
    quiet_transformers,
    read_model_config,
    tokenizer_end,
    weights_dtype,
)
from kvarena.engine.models.limits import num_decoder_layers
from kvarena.engine.models.loader import model_spec
from kvarena.engine.models.made_packed import packed_shape
from kvarena.engine.models.packed_loader import expert_modules, linear_layers
from kvarena.engine.models.probe import trace_attention
from kvarena.engine.models.spec import ModelSpec

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelSizes:
    """A model as the simulator sees it.

    Attributes:
        spec: what the engine knows of a model.
        special_token_ids: tokens that are not text.
        num_heads: query heads of a layer.
        num_layer_weights: weights that every token is multiplied with: all but embeddings and the output head.
        num_head_weights: weights of the output head, which a sampled token is multiplied with.
        num_experts: experts of a layer; 1 for a dense model.
        hidden_size: of a token between two layers.
        intermediate_size: width of the MLP, or of each expert.
        saved_bytes: what a GPU keeps packed of the weights of linear layers and experts takes so much less than in
            `spec.dtype`.
    """

    spec: ModelSpec
    special_token_ids: frozenset[int]
    num_heads: int
    num_layer_weights: int
    num_head_weights: int
    num_experts: int = 1
    saved_bytes: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.spec.num_parameters * self.spec.dtype.itemsize - self.saved_bytes


def model_sizes(
    path: str | Path | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    name: str | None = None,
    drawn: str | None = None,
) -> ModelSizes:
    """The sizes of a model, from its config alone. Arguments: see `load_model`; `drawn`: how weights are packed
    that are drawn or made of plain ones.

    A model is traced once in a process, whose sweep may have hundreds of cells; a directory again when one of its files
    is another one.

    Raises:
        ConfigError: a setting is out of range, or the settings do not fit together.
        ModelError: the directory is missing or broken, or the layers are not standard attention.
    """
    try:
        files = None if path is None else tuple(sorted(_stamp(file) for file in Path(path).iterdir()))
    except OSError:  # no such directory, or a file that cannot be looked at: reading it says so
        return _sizes(path, shape, dtype, trust_remote_code, name, drawn)
    if trust_remote_code:  # its code may read anything
        return _sizes(path, shape, dtype, trust_remote_code, name, drawn)
    return _sizes_once(path, json.dumps(dict(shape)) if shape else None, dtype, name, drawn, files)


Stamp = tuple[str, int, int]


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return file.name, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=32)
def _sizes_once(
    path: str | Path | None,
    shape: str | None,
    dtype: str,
    name: str | None,
    drawn: str | None,
    files: tuple[Stamp, ...] | None,
) -> ModelSizes:
    """The sizes, once for each `files` that the directory held."""
    del files  # a part of the key alone
    return _sizes(path, json.loads(shape) if shape else None, dtype, False, name, drawn)


def _sizes(
    path: str | Path | None,
    shape: Mapping[str, Any] | None,
    dtype: str,
    trust_remote_code: bool,
    name: str | None,
    drawn: str | None,
) -> ModelSizes:
    with quiet_transformers():
        config, directory, name, whole = read_model_config(path, shape, name, trust_remote_code)
        module = build_dummy(config, weights_dtype(dtype, config), "meta", 0, trust_remote_code, name).eval()
        for part in module.modules():
            # They choose their frequencies by the values of positions, which the meta device has not.
            if getattr(part, "rope_type", None) in ("dynamic", "longrope"):
                part.rope_type = "default"  # type: ignore[assignment]
        text = config.get_text_config()
        embedding = cast(nn.Module, module.get_input_embeddings()).weight  # type: ignore[operator]
        geometry = trace_attention(module, name, num_decoder_layers(text, name), cast(torch.Tensor, embedding).shape[0])
        eos, special = end_and_special_tokens(module, text, directory, tokenizer_end(directory, trust_remote_code))
    spec = model_spec(module, text, name, geometry, eos)
    head = module.get_output_embeddings().weight  # type: ignore[operator]
    tables = {id(m.weight): m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding)}
    outside = tables | {id(head): head.numel()}
    num_experts = [getattr(text, field, None) for field in EXPERT_FIELDS]
    return ModelSizes(
        spec=spec,
        special_token_ids=special,
        num_heads=text.num_attention_heads,
        num_layer_weights=spec.num_parameters - sum(outside.values()),
        num_head_weights=head.numel(),
        num_experts=max(count for count in (1, *num_experts) if isinstance(count, int)),
        saved_bytes=_saved_bytes(_packing(directory, module, name, drawn, whole), module),
        hidden_size=cast(torch.Tensor, embedding).shape[1],
        intermediate_size=_width(text, spec),
    )


def _width(text: Any, spec: ModelSpec) -> int:
    """Width of the MLP, or of each expert; 0 where the config does not say."""
    fields = ("moe_intermediate_size", "intermediate_size") if spec.experts else ("intermediate_size", "ffn_dim")
    return next((value for field in fields if isinstance(value := getattr(text, field, None), int)), 0)


def _packing(
    directory: Path | None, module: nn.Module, name: str, drawn: str | None, whole: PretrainedConfig | None
) -> PackedCheckpoint | None:
    """How the weights are packed; None: not, or in a directory without weights, whose layers nothing tells."""
    said = None if directory is None else quantization(read_config(directory))
    if drawn is not None and (said is None or drawn != said):
        check_drawn(drawn)
        return packed_shape(module, name, drawn)
    if directory is None or not any(directory.glob("*.safetensors")):
        return None
    found = packed_checkpoint(directory, read_config(directory))
    if found is None or whole is None:
        return found
    # Imported here: of a model that reads text nothing of it is needed.
    from kvarena.engine.vision.checkpoint import packed_text
    from kvarena.engine.vision.composite import part_checkpoint

    return packed_text(part_checkpoint(directory, whole, torch.device("cpu")).text, found).checkpoint


def _saved_bytes(checkpoint: PackedCheckpoint | None, module: nn.Module) -> int:
    """See `ModelSizes.saved_bytes`."""
    if checkpoint is None:
        return 0
    size = next(module.parameters()).dtype.itemsize
    names = list(linear_layers(module, checkpoint).values())
    for _, experts in expert_modules(module):
        for way in experts.ways:
            parts = [part for expert in way for part in expert]
            if all(part in checkpoint.entries for part in parts):
                names += parts
                break
    entries = [checkpoint.entries[name] for name in names]
    return sum(entry.num_outputs * entry.num_inputs * size - entry.num_bytes for entry in entries)
