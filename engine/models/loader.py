"""Loads a model: a local directory's weights, or a shape with dummy weights. No hub is ever asked.

Weights go from the safetensors files to the device one by one, so host memory holds no second copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from engine.errors import ConfigError, ModelError
from engine.models.directory import (
    check_config,
    check_weights,
    one_line,
    resolve_directory,
    special_token_ids,
)
from engine.models.limits import max_model_len
from engine.models.probe import probe_attention
from engine.models.spec import LoadedModel, ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_FORMATS = ("auto", "dummy")


def load_model(
    path: str | Path | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    name: str | None = None,
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

    Raises:
        ConfigError: a setting is out of range, or the settings do not fit together.
        ModelError: the directory is missing or broken, or the runner cannot drive the model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"engine.dtype={dtype} must be one of {', '.join(DTYPES)} or auto")
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"model.load_format={load_format} must be one of {', '.join(LOAD_FORMATS)}")
    if (path is None) == (shape is None):
        what = "both are set" if path is not None else "neither is set"
        raise ConfigError(f"give model.path (a local directory) or model.shape, and not both: {what}")
    directory = None if path is None else resolve_directory(path)
    if directory is None and load_format == "auto":
        raise ConfigError("model.shape has no weights to read; set model.load_format=dummy")
    with _quiet_transformers():
        if directory is not None:
            name = name or directory.name
            config = _read_config(directory, trust_remote_code)
        else:
            config = _config_from_shape(shape or {})
            name = name or config.model_type
        _check_architecture(config, name, trust_remote_code)
        weights = _dtype(dtype, config)
        if load_format == "dummy" or directory is None:
            module = _dummy(config, weights, device, seed, trust_remote_code, name)
        else:
            check_weights(directory)
            module = _from_directory(directory, config, weights, device, trust_remote_code)
        module.eval().requires_grad_(False)
        return _describe(module, config.get_text_config(), name, directory)


def _describe(module: nn.Module, text: PretrainedConfig, name: str, directory: Path | None) -> LoadedModel:
    """Probe the module and note what the engine needs to know of it."""
    # The embedding may be larger than the tokenizer; ids below its size are valid inputs.
    num_ids = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    geometry = probe_attention(module, name, text.num_hidden_layers, num_ids)
    eos = _as_set(getattr(module.generation_config, "eos_token_id", None)) or _as_set(text.eos_token_id)
    special = eos | _as_set(text.eos_token_id) | _as_set(text.bos_token_id) | _as_set(text.pad_token_id)
    if directory is not None:
        special |= special_token_ids(directory)
    spec = ModelSpec(
        name=name,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=geometry.vocab_size,
        max_model_len=max_model_len(text, name),
        dtype=next(module.parameters()).dtype,
        eos_token_ids=eos,
        bos_token_id=text.bos_token_id,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        sliding_window=geometry.sliding_window,
    )
    slices_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
    return LoadedModel(module, spec, directory, frozenset(token for token in special if token >= 0), slices_logits)


def _read_config(directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    raw = check_config(directory)
    if raw["model_type"] not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise ModelError(
                f"{directory}/config.json names model type {raw['model_type']!r}, which transformers "
                f"{transformers.__version__} does not know"
            )
        if not trust_remote_code:
            raise ModelError(
                f"{directory} brings its own Python code for model type {raw['model_type']!r}; if you trust it, set "
                "model.trust_remote_code=true"
            )
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    # Anything: config classes check their fields in many ways.
    except Exception as error:
        raise ModelError(f"{directory}/config.json is not a valid config: {one_line(error)}") from error


def _config_from_shape(shape: Mapping[str, Any]) -> PretrainedConfig:
    fields = dict(shape)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model.shape.model_type={model_type} is not a model type of transformers")
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:
        raise ConfigError(f"model.shape is not a valid {model_type} config: {one_line(error)}") from error


def _check_architecture(config: PretrainedConfig, name: str, trust_remote_code: bool) -> None:
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ModelError(
            f"{name} cannot be run: transformers has no causal language model for model type {config.model_type!r}"
        )


def _dtype(dtype: str, config: PretrainedConfig) -> torch.dtype | str:
    """The dtype to load in; "auto" where neither the user nor the config says."""
    if dtype != "auto":
        return DTYPES[dtype]
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stated, str):
        stated = DTYPES.get(stated.removeprefix("torch."))
    return stated if isinstance(stated, torch.dtype) else "auto"


def _from_directory(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    trust_remote_code: bool,
) -> nn.Module:
    placement = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
            **placement,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{directory} does not fit in the memory of {device}; use a smaller model or dtype") from error
    # Anything: loading runs the code of many libraries, and of the model.
    except Exception as error:
        raise ModelError(f"{directory} cannot be loaded: {one_line(error)}") from error
    module, info = loaded
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{directory}: weight {key} has shape {list(found)} and config.json asks for {list(expected)}; "
            "config.json and weights do not belong together"
        )
    # transformers would draw missing weights at random.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{directory} lacks the weights {', '.join(missing[:3])}{more}; copy the model again")
    return module


def _dummy(
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    seed: int,
    trust_remote_code: bool,
    name: str,
) -> nn.Module:
    """Random weights, drawn where they will be used. The caller's random state stays as it was."""
    target = torch.device(device)
    try:
        with torch.random.fork_rng([target] if target.type == "cuda" else []), target:
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32 if dtype == "auto" else dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{name} does not fit in the memory of {device}; use a smaller model or dtype") from error
    # Anything: a config may be valid field by field and still not make a model.
    except Exception as error:
        raise ModelError(f"{name} cannot be built from its config: {one_line(error)}") from error


def _as_set(token_ids: int | list[int] | None) -> frozenset[int]:
    if token_ids is None:
        return frozenset()
    return frozenset([token_ids] if isinstance(token_ids, int) else token_ids)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no load report: what matters of them becomes an error line here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
