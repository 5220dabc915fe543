"""Loads a rank's part of a model: as `load_model` does the whole, with slices of the weights.

config of the whole --Shard--> config and tensors of the part --> a model of the same class --> probe --> bind
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import one_line, read_config
from kvarena.engine.checkpoints.packed import packed_checkpoint
from kvarena.engine.checkpoints.packed_settings import MADE
from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models.building import (
    build_dummy,
    check_head,
    check_host,
    check_report,
    does_not_fit,
    element_type,
    placement,
)
from kvarena.engine.models.configs import quiet_transformers, read_model_config, tokenizer_end, weights_dtype
from kvarena.engine.models.loader import describe, planned
from kvarena.engine.models.packed_loader import PackedLoad, forget_packing, load_packed
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.parallel.bind import bind
from kvarena.engine.parallel.groups import Groups
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.parallel.shard import Shard
from kvarena.engine.pool.memory_limits import free_bytes, is_out_of_memory
from kvarena.engine.quantization.state import PackedShare, PackedTensors, open_tensors

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.composite import Composite


def load_part(
    groups: Groups,
    path: str | Path | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    name: str | None = None,
    image_cache_bytes: int = 0,
    quantization: str | None = None,
) -> LoadedModel:
    """A rank's part of a model, ready to run with the others; the other arguments and errors are `load_model`'s.

    Args:
        groups: the ranks that share the model.

    Raises:
        ConfigError: the model cannot be shared out so; names the setting.
    """
    with quiet_transformers():
        config, directory, name, whole = read_model_config(path, shape, name, trust_remote_code)
        weights, own_end = weights_dtype(dtype, config), tokenizer_end(directory, trust_remote_code)
        read = None if load_format == "dummy" else directory
        if read is not None:
            check_checkpoint(read, quantization=quantization)
        composite = None
        if whole is not None:
            from kvarena.engine.vision.composite import Composite

            composite = Composite(whole, directory, shape, torch.device(device), has_weights=read is not None)
        shard = _shard_of(groups.layout, config, read, name, quantization)
        part, packing = shard.local_config(), ""
        if read is None:
            module = build_dummy(part, weights, device, seed, trust_remote_code, name)
        else:
            module, packing = _from_parts(shard, read, part, weights, device, composite)
        module.eval().requires_grad_(False)
        text = config.get_text_config()
        loaded = describe(module, part.get_text_config(), name, directory, own_end, packing, text)
        bind(module, shard, groups.tensor)
        spec = replace(loaded.spec, vocab_size=shard.cuts.vocab_size)
        loaded = replace(loaded, spec=spec, shard=shard, groups=groups)
        if composite is None:
            return loaded
        loaded = replace(loaded, has_grids=composite.has_grids)
        if not shard.layout.is_first:
            return loaded
        images = composite.encoder(module, seed, image_cache_bytes)
        shard.check_depth(images.tower.num_levels)
        return replace(loaded, images=images)


def check_parts(
    layout: Layout,
    path: str | Path | None,
    shape: Mapping[str, Any] | None,
    name: str | None,
    trust_remote_code: bool,
    load_format: str,
    quantization: str | None,
) -> None:
    """See that a model can be shared out so, before anything is started for it; arguments as of `load_model`.

    Raises:
        ConfigError: it cannot; names the setting.
    """
    with quiet_transformers():
        config, directory, name, _ = read_model_config(path, shape, name, trust_remote_code)
        shard = _shard_of(layout, config, None if load_format == "dummy" else directory, name, quantization)
        whole = build_dummy(config, "auto", "meta", 0, False, name)
        for stage in range(1, layout.pipeline):
            other = replace(shard, layout=layout.of(layout.rank_of(stage)))
            other.check(whole, build_dummy(other.local_config(), "auto", "meta", 0, False, name))


def _shard_of(
    layout: Layout, config: PretrainedConfig, directory: Path | None, name: str, quantization: str | None
) -> Shard:
    """A rank's part of a model.

    Args:
        layout: which rank's.
        config: of the whole model; forgets how its weights are packed.
        directory: whose weights are read; None: they are drawn.
        name: how error messages call it.
        quantization: see `load_model`.

    Raises:
        ConfigError: the model cannot be parted so; names the setting.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"parallel ({layout}) is not available for {name!r}: transformers has no class of its own for language "
            f"models of type {config.model_type!r}; use 1 x 1"
        )
    packed = directory is not None and packed_checkpoint(directory, read_config(directory)) is not None
    if quantization in MADE and not packed:
        raise ConfigError(
            f"model.quantization={quantization} makes packed weights on one device, and parallel ({layout}) shares the "
            "model out; leave one out"
        )
    if directory is not None and getattr(config, "quantization_config", None) and not packed:
        raise ConfigError(
            f"parallel ({layout}) is not available for {name!r}: its weights are quantised in a way that is not cut "
            "into parts; use 1 x 1"
        )
    forget_packing(config)
    shard = Shard(layout, config, name)
    whole, part = (build_dummy(one, "auto", "meta", 0, False, name) for one in (config, shard.local_config()))
    shard.check(whole, part)
    return shard


def _from_parts(
    shard: Shard,
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    composite: Composite | None,
) -> tuple[nn.Module, str]:
    """A rank's model with its slices of the directory's weights. As `_from_directory`.

    Args:
        shard: what the rank has.
        config: of its part.
        directory, dtype, device, composite: see there.
    """
    target = torch.device(device)
    if target.type == "cuda":  # each rank has a GPU of its own
        target = torch.device("cuda", torch.cuda.current_device())
    checkpoint = packed_checkpoint(directory, read_config(directory))
    load: PackedLoad | None = None
    if checkpoint is not None:
        dtype = torch.float16 if dtype == "auto" else element_type(dtype)
        packed = PackedTensors(checkpoint, dtype, target) if composite is None else composite.packed(checkpoint)
        of_rank = _of_rank(packed, shard)
        load = planned(lambda _: of_rank, config, dtype, target, False, str(directory))
        mine, stored = of_rank.plain, packed.state()
    else:
        stored = open_tensors(directory) if composite is None else composite.text
        mine = shard.cut(stored)
    check_head(directory, stored, shard.config, *([] if composite is None else [composite.config]))
    if shard.layout.pipeline == 1 and composite is not None:
        config.tie_word_embeddings = "lm_head.weight" not in mine
    free = free_bytes(target)
    if target.type == "cpu":
        check_host(str(directory), config, dtype, free, False)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options: dict[str, Any] = {
        "attn_implementation": "eager", "ignore_mismatched_sizes": True, "output_loading_info": True,
        **placement(str(directory), target),
    }  # fmt: skip
    try:
        if load is not None and isinstance(dtype, torch.dtype):
            module, info = load_packed(load, config, dtype, **options)
        else:
            module, info = kind.from_pretrained(None, state_dict=mine, config=config, dtype=dtype, **options)
    # Anything: as in `_from_directory`.
    except Exception as error:
        if is_out_of_memory(error):
            raise does_not_fit(str(directory), config, dtype, target, free, False, load) from error
        raise ModelError(f"{directory} cannot be loaded: {one_line(error)}") from error
    check_report(directory, shard.config, shard.report_in_whole(info, stored))
    return module, "" if load is None else load.summary


def _of_rank(tensors: PackedTensors, shard: Shard) -> PackedTensors:
    """A rank's tensors of a packed checkpoint: slices of what is plain, parts of what is packed."""
    packed, rest = {}, dict(tensors.plain)
    for name, source in tensors.packed.items():
        part = shard.layer_part(name, source.get_shape())
        if part is None:  # the output head, which is dequantised where it is cut; or no part of this stage
            rest[f"{name}.weight"] = source
        else:
            packed[part[0]] = PackedShare(source, *part)
    return tensors.of_rank(shard.cut(rest), packed)
