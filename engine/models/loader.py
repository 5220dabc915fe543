"""Loads a model: a local directory's weights, or a shape with dummy weights. No hub is asked here.

Weights go from the safetensors files to the device one by one, so host memory holds no second copy.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import one_line, read_config
from kvarena.engine.checkpoints.kinds import DEQUANTIZED
from kvarena.engine.checkpoints.packed import packed_checkpoint
from kvarena.engine.checkpoints.packed_settings import MADE, check_drawn
from kvarena.engine.checkpoints.weights import weight_files
from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models.building import (
    build_dummy,
    check_head,
    check_host,
    check_report,
    does_not_fit,
    element_type,
    keeps_packed,
    placement,
)
from kvarena.engine.models.configs import (
    end_and_special_tokens,
    quiet_transformers,
    read_model_config,
    tokenizer_end,
    weights_dtype,
)
from kvarena.engine.models.expert_files import expert_fault
from kvarena.engine.models.experts import ExpertsRead, expert_sizes
from kvarena.engine.models.limits import latent_dim, limited_by, max_model_len, num_decoder_layers, stated_len
from kvarena.engine.models.made_packed import load_packed_dummy, made_tensors, plan_dummy
from kvarena.engine.models.packed_loader import PackedLoad, expert_modules, forget_packing, load_packed, plan_packed
from kvarena.engine.models.probe import AttentionGeometry, probe_attention
from kvarena.engine.models.spec import LoadedModel, ModelSpec
from kvarena.engine.pool.memory_limits import free_bytes, is_out_of_memory
from kvarena.engine.quantization.experts import packed_weights
from kvarena.engine.quantization.state import PackedTensors, open_tensors

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.composite import Composite

LOAD_FORMATS = ("auto", "dummy")
logger = logging.getLogger(__name__)


def load_model(
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
    """Load a model and see that the runner can drive it.

    Args:
        path: a transformers model directory; a relative one is looked for in the working directory, then in the
            project's root.
        shape: in place of `path`, the content of a config.json; needs `load_format=dummy`.
        dtype: float32, bfloat16, float16, or auto: what the checkpoint or the shape says.
        device: where the weights go.
        load_format: auto reads the weights, dummy draws random ones on the device.
        seed: of the dummy weights.
        trust_remote_code: run the directory's own Python code.
        name: how reports call the model; None takes the directory's name.
        image_cache_bytes: for what the vision tower has encoded, of a model that reads images.
        quantization: the method with which the weights must be quantised; None: any, or none. int8 and fp8 are made
            of plain weights; dummy weights are drawn so.

    Raises:
        ConfigError: a setting is out of range, or the settings do not fit together.
        ModelError: the directory is missing or broken, or the runner cannot drive the model.
    """
    if load_format == "dummy":
        check_drawn(quantization)
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"model.load_format={load_format} must be one of {', '.join(LOAD_FORMATS)}")
    if path is None and shape is not None and load_format == "auto":
        raise ConfigError("model.shape has no weights to read; set model.load_format=dummy")
    with quiet_transformers():
        config, directory, name, whole = read_model_config(path, shape, name, trust_remote_code)
        weights = weights_dtype(dtype, config)
        own_end = tokenizer_end(directory, trust_remote_code)
        composite, has_weights, packing = None, load_format != "dummy" and directory is not None, ""
        if directory is not None and has_weights:
            check_checkpoint(directory, quantization=quantization)
        if whole is not None:
            # Imported here: of a model that reads text nothing of it is needed.
            from kvarena.engine.vision.composite import Composite

            composite = Composite(whole, directory, shape, torch.device(device), has_weights=has_weights)
        if (directory is None or not has_weights) and quantization is not None:
            module, packing = _packed_dummy(config, weights, device, seed, trust_remote_code, name, quantization)
        elif directory is None or not has_weights:
            module = build_dummy(config, weights, device, seed, trust_remote_code, name)
        else:
            module, packing = _from_directory(
                directory, config, weights, device, trust_remote_code, composite, quantization
            )
        module.eval().requires_grad_(False)
        loaded = describe(module, config.get_text_config(), name, directory, own_end, packing)
        if composite is None:
            return loaded
        images = composite.encoder(module, seed, image_cache_bytes)
        return replace(loaded, images=images, has_grids=composite.has_grids)


def describe(
    module: nn.Module,
    text: PretrainedConfig,
    name: str,
    directory: Path | None,
    own_end: int | None,
    packing: str,
    whole: PretrainedConfig | None = None,
) -> LoadedModel:
    """Probe the module and note what the engine needs to know of it.

    `packing`: see `ModelSpec.quantization`. `whole`: the config of which `text` is a rank's part; None: it is whole.
    """
    # The embedding may be larger than the tokenizer; ids below its size are valid inputs.
    num_ids = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    geometry = probe_attention(module, name, num_decoder_layers(text, name), num_ids)
    eos, special = end_and_special_tokens(module, text if whole is None else whole, directory, own_end)
    slices_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
    spec = model_spec(module, text, name, geometry, eos, packing)
    reads = None if spec.experts is None else ExpertsRead(module)
    stated = stated_len(text)
    if spec.limited_by and stated is not None and spec.max_model_len < stated:
        logger.warning(
            "%s: a context of %d tokens, of %d that config.json states: %s", name, spec.max_model_len, stated,
            spec.limited_by,
        )  # fmt: skip
    return LoadedModel(module, spec, directory, special, slices_logits, experts_read=reads)


def model_spec(
    module: nn.Module,
    text: PretrainedConfig,
    name: str,
    geometry: AttentionGeometry,
    eos: frozenset[int],
    packing: str = "",
) -> ModelSpec:
    """What the engine knows of a module, on whichever device it is; `packing`: see `ModelSpec.quantization`.

    Raises:
        ModelError: its text config states no context length.
    """
    return ModelSpec(
        name=name,
        max_model_len=max_model_len(text, name),
        dtype=next(module.parameters()).dtype,
        eos_token_ids=eos,
        bos_token_id=getattr(text, "bos_token_id", None),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()) + packed_weights(module),
        latent_dim=latent_dim(text),
        limited_by=limited_by(text),
        quantization=packing,
        experts=expert_sizes(module, text),
        **geometry._asdict(),
    )


def _from_directory(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    trust_remote_code: bool,
    composite: Composite | None,
    quantization: str | None,
) -> tuple[nn.Module, str]:
    """A causal language model with its weights: all of the directory's, or those of a `composite`'s language model.

    Returns:
        The module, and `ModelSpec.quantization`.
    """
    said = getattr(config, "quantization_config", None)
    if isinstance(said, dict) and said.get("quant_method") in DEQUANTIZED:
        # What kernels run quantised weights, if any, depends on the device; plain weights run everywhere alike.
        said["dequantize"] = True
    target = torch.device(device)
    options: dict[str, Any] = {
        "attn_implementation": "eager",
        "ignore_mismatched_sizes": True,  # reported below, in one line
        "output_loading_info": True,
        **placement(directory, target),
    }
    checkpoint = packed_checkpoint(directory, read_config(directory))
    if checkpoint is not None and dtype == "auto":
        dtype = torch.float16  # of the scales, in all that packs weights
    free = free_bytes(target)
    # However small the files are: of what they lack the config says the size, and transformers makes it.
    if target.type == "cpu":
        check_host(str(directory), config, dtype, free, trust_remote_code)
    load = None
    if checkpoint is not None and isinstance(dtype, torch.dtype):
        packed = PackedTensors(checkpoint, dtype, target) if composite is None else composite.packed(checkpoint)
        load = planned(lambda _: packed, config, dtype, target, trust_remote_code, str(directory))
    elif quantization in MADE and said is None:
        dtype = element_type(dtype)
        named = open_tensors(directory) if composite is None else composite.text
        make = functools.partial(
            made_tensors, name=str(directory), method=quantization, named=named, dtype=dtype, device=target
        )
        load = planned(make, config, dtype, target, trust_remote_code, str(directory))
    if composite is not None:
        check_head(directory, composite.text, config, composite.config)
        config.tie_word_embeddings = "lm_head.weight" not in composite.text
    try:
        if load is not None and isinstance(dtype, torch.dtype):
            loaded: Any = load_packed(load, config, dtype, **options)
        elif composite is not None:
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded = kind.from_pretrained(None, state_dict=composite.text, config=config, dtype=dtype, **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                str(directory),
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
    # Anything: loading runs the code of many libraries, and of the model.
    except Exception as error:
        if is_out_of_memory(error):
            raise does_not_fit(str(directory), config, dtype, target, free, trust_remote_code, load) from error
        fault = _expert_fault(directory, config, load, composite, trust_remote_code)
        raise ModelError(f"{directory}{fault or f' cannot be loaded: {one_line(error)}'}") from error
    module, info = loaded
    if info["mismatched_keys"] or info["missing_keys"]:
        fault = _expert_fault(directory, config, load, composite, trust_remote_code)
        if fault is not None:
            raise ModelError(f"{directory}{fault}")
    check_report(directory, config, info)
    return module, "" if load is None else load.summary


def _expert_fault(
    directory: Path,
    config: PretrainedConfig,
    load: PackedLoad | None,
    composite: Composite | None,
    trust_remote_code: bool,
) -> str | None:
    """See `expert_fault`; looked for when loading has failed."""
    shape = build_dummy(config, "auto", "meta", 0, trust_remote_code, str(directory))
    if next(expert_modules(shape), None) is None:
        return None
    if load is not None:
        return expert_fault(shape, load.tensors.state())
    if composite is not None:
        return expert_fault(shape, composite.text)
    if any(file.suffix != ".safetensors" for file in weight_files(directory)):
        return None  # the names lie in the pickle, which may be what is broken
    return expert_fault(shape, open_tensors(directory))


def planned(
    make: Callable[[nn.Module], PackedTensors],
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    name: str,
) -> PackedLoad:
    """What becomes of packed weights, said in a line; the config forgets that they are. Raises ModelError.

    `make` gives the tensors, of the model on the meta device.
    """
    forget_packing(config)
    shape = build_dummy(config, dtype, "meta", 0, trust_remote_code, name)
    load = plan_packed(make(shape), shape, stay_packed=keeps_packed(device))
    checkpoint = load.checkpoint
    # Dequantised weights take four times what the files do: a line that nobody has to ask for.
    level = logging.INFO if len(load.kept) == len(checkpoint.entries) else logging.WARNING
    logger.log(level, "%s: %s", checkpoint.directory, load.describe())
    return load


def _packed_dummy(
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    seed: int,
    trust_remote_code: bool,
    name: str,
    method: str,
) -> tuple[nn.Module, str]:
    """Random weights that `method` packed: as `_from_directory`."""
    target, made = torch.device(device), element_type(dtype)
    free = free_bytes(target)
    shape = build_dummy(config, made, "meta", 0, trust_remote_code, name)
    load = plan_dummy(shape, name, method, made, target, seed, stay_packed=keeps_packed(target))
    if target.type == "cpu":
        check_host(name, config, dtype, free, trust_remote_code)
    try:
        module = load_packed_dummy(
            load, config, made, target, seed, attn_implementation="eager", output_loading_info=True,
            ignore_mismatched_sizes=True, **placement(name, target),
        )  # fmt: skip
    # Anything: as for weights that are read.
    except Exception as error:
        if is_out_of_memory(error):
            raise does_not_fit(name, config, dtype, target, free, trust_remote_code, load) from error
        raise
    return module, f"random {load.summary}"
