"""What a model's config says, read before any weight: from a directory, or from a bare shape."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from kvarena.engine.checkpoints.directory import (
    end_token,
    in_files,
    is_model_name,
    one_line,
    read_config,
    resolve_directory,
    special_token_ids,
    token_id,
)
from kvarena.engine.checkpoints.images import end_tokens, has_class, reads_images
from kvarena.engine.checkpoints.kinds import check_kind
from kvarena.engine.checkpoints.tokenizer import has_tokenizer, load_tokenizer
from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models.experts import check_top_k
from kvarena.engine.models.limits import check_layers
from kvarena.engine.vision.configs import text_config, whole_config

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NamedConfig(NamedTuple):
    """A model's config, and where it came from.

    Attributes:
        config: of the language model.
        directory: of the files; None for a shape.
        name: how reports call the model.
        whole: of a model that reads images: the language model's config is a part of it.
    """

    config: PretrainedConfig
    directory: Path | None
    name: str
    whole: PretrainedConfig | None = None


def read_model_config(
    path: str | Path | None, shape: Mapping[str, Any] | None, name: str | None, trust_remote_code: bool
) -> NamedConfig:
    """The config of `path` or of `shape`; see `load_model` for the arguments.

    Raises:
        ConfigError: both or neither are given, or the shape is not valid.
        ModelError: the directory is missing or broken, or no causal language model has this config.
    """
    if (path is None) == (shape is None):
        what = "both are set" if path is not None else "neither is set"
        raise ConfigError(f"give model.path (a local directory) or model.shape, and not both: {what}")
    directory = None if path is None else resolve_directory(path)
    if directory is not None:
        # The folder of a downloaded model is called by its revision.
        name = name or (Path(str(path)).name if is_model_name(str(path)) else directory.name)
        config = _read_config(directory, trust_remote_code)
    else:
        config = _config_from_shape(shape or {})
        name = name or config.model_type
    whole = config if reads_images({"model_type": config.model_type}) else None
    if whole is not None:
        config = text_config(whole)
    _check_architecture(config, name, trust_remote_code and whole is None)
    check_layers(config.get_text_config(), name)
    try:
        check_top_k(config.get_text_config())
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    return NamedConfig(config, directory, name, whole)


def end_and_special_tokens(
    module: nn.Module, text: PretrainedConfig, directory: Path | None, own_end: int | None
) -> tuple[frozenset[int], frozenset[int]]:
    """Tokens that end a request, and tokens that are not text (the former among them).

    A text ends at what the generation config names, or else the model config; and at the tokenizer's own end token,
    which is the only one that says so in many chat tunes of base models.

    Args:
        module: the model, for the generation config that its config implies.
        text: the config of the text model.
        directory: with generation config and tokenizer files, or None.
        own_end: the tokenizer's end token (`tokenizer_end`).

    Raises:
        ModelError: the generation config is broken.
    """
    # A few config classes have none of these fields.
    named = {name: _as_set(getattr(text, f"{name}_token_id", None)) for name in ("bos", "eos", "pad")}
    eos = _as_set(_generation_eos(module, directory)) or named["eos"]
    # One that only the tokenizer has, beyond the model's logits, is never sampled.
    if own_end is not None and own_end < text.vocab_size:
        eos |= {own_end}
    if directory is not None:
        ends = (token_id(directory, token) for token in end_tokens(directory))
        eos |= {end for end in ends if end is not None}
    special = eos.union(*named.values())
    if directory is not None:
        special |= special_token_ids(directory)
    return eos, frozenset(token for token in special if token >= 0)


def _generation_eos(module: nn.Module, directory: Path | None) -> int | list[int] | None:
    """What ends a text: the directory's generation config goes before the one that the model config implies."""
    config = getattr(module, "generation_config", None)
    if directory is not None and (directory / "generation_config.json").is_file():
        try:
            config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}/generation_config.json cannot be read: {error}") from error
    return getattr(config, "eos_token_id", None)


def tokenizer_end(directory: Path | None, trust_remote_code: bool) -> int | None:
    """The end token of the directory's tokenizer, which is loaded only when its JSON files do not tell.

    Call it before the weights are read: a broken tokenizer must not wait for them.

    Args:
        directory: of the model; None: there is none.
        trust_remote_code: run the directory's own tokenizer code, where the end token is known to that alone.

    Raises:
        ModelError: the tokenizer is broken.
    """
    if directory is None or not has_tokenizer(directory, trust_remote_code):
        return None
    token = end_token(directory)
    if token == "":
        return None
    found = None if token is None else token_id(directory, token)
    return load_tokenizer(directory, trust_remote_code).eos_token_id if found is None else found


def weights_dtype(dtype: str, config: PretrainedConfig) -> torch.dtype | str:
    """The dtype to load in; "auto" where neither the user nor the config says. Raises ConfigError on an unknown one."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"engine.dtype={dtype} must be one of {', '.join(DTYPES)} or auto")
    if dtype != "auto":
        return DTYPES[dtype]
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stated, str):
        stated = DTYPES.get(stated.removeprefix("torch."))
    return stated if isinstance(stated, torch.dtype) else "auto"


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


def _read_config(directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    raw = read_config(directory)
    check_kind(directory, raw, weights=False)
    if reads_images(raw):
        if trust_remote_code and not has_class(raw) and "auto_map" in raw:
            logger.warning(
                "%s is converted as it is loaded: none of its own code%s runs, and model.trust_remote_code=true is not "
                "needed", directory, in_files(raw),
            )  # fmt: skip
        try:
            return whole_config(raw)
        except ModelError as error:
            raise ModelError(f"{directory}/config.json: {error}") from error
    own_code = "auto_map" in raw
    if raw["model_type"] not in CONFIG_MAPPING:
        if not own_code:
            raise ModelError(
                f"{directory}/config.json names model type {raw['model_type']!r}, which transformers "
                f"{transformers.__version__} does not know"
            )
        if not trust_remote_code:
            raise ModelError(
                f"{directory} brings its own Python code for model type {raw['model_type']!r}{in_files(raw)}, which "
                "nothing here stands in for; if you have read and trust it, set model.trust_remote_code=true"
            )
    elif own_code and trust_remote_code and CONFIG_MAPPING[raw["model_type"]] in MODEL_FOR_CAUSAL_LM_MAPPING:
        logger.warning(
            "%s: transformers has model type %r itself; without model.trust_remote_code=true none of the checkpoint's "
            "own code%s would run", directory, raw["model_type"], in_files(raw),
        )  # fmt: skip
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    # Anything: config classes check their fields in many ways.
    except Exception as error:
        raise ModelError(f"{directory}/config.json is not a valid config: {one_line(error)}") from error


def _config_from_shape(shape: Mapping[str, Any]) -> PretrainedConfig:
    fields = dict(shape)
    if reads_images(fields):
        return whole_config(fields)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model.shape.model_type={model_type} is not a model type of transformers")
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:
        raise ConfigError(f"model.shape is not a valid {model_type} config: {one_line(error)}") from error


def _check_architecture(config: PretrainedConfig, name: str, trust_remote_code: bool) -> None:
    auto_map = getattr(config, "auto_map", None) or {}
    has_code = "AutoModelForCausalLM" in auto_map
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (has_code and trust_remote_code):
        if has_code:
            raise ModelError(
                f"transformers has no causal language model for model type {config.model_type!r} of {name}, whose own "
                f"code has one{in_files({'auto_map': auto_map})}; if you have read and trust it, set "
                "model.trust_remote_code=true"
            )
        raise ModelError(
            f"{name} cannot be run: transformers has no causal language model for model type {config.model_type!r}"
        )


def _as_set(token_ids: int | list[int] | None) -> frozenset[int]:
    if token_ids is None:
        return frozenset()
    return frozenset([token_ids] if isinstance(token_ids, int) else token_ids)
