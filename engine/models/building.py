"""A model's module: made without its files, placed on a device, and held against what was read of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.errors import ModelError
from kvarena.engine.models.packed_loader import PackedLoad
from kvarena.engine.pool.memory_limits import free_bytes, is_out_of_memory, size_text

# Decoder layers, as model classes name their lists of them.
LAYER_OF_KEY = re.compile(
    r"^(?:model\.|transformer\.|language_model\.|decoder\.|gpt_neox\.)*(?:layers|h|blocks)\.(\d+)\."
)
logger = logging.getLogger(__name__)


def placement(directory: Path | str, device: torch.device) -> dict[str, Any]:
    """How transformers is told where the weights go. Raises ModelError: a package for that is not there."""
    if device.type == "cpu":
        return {}
    if find_spec("accelerate") is None:
        raise ModelError(
            f"transformers needs accelerate to load {directory} onto {device}: pip install 'kvarena[gpu]', or run "
            "it on a CPU (engine.device=cpu)"
        )
    return {"device_map": {"": device}}


def keeps_packed(device: torch.device) -> bool:
    """Whether weights that a checkpoint packs stay so on `device`: a CPU has no kernel for them."""
    return device.type == "cuda"


def check_report(directory: Path, config: PretrainedConfig, info: dict[str, Any]) -> None:
    """See that every weight was there and of its shape. Raises ModelError."""
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
    _check_surplus(sorted(info["unexpected_keys"]), config.get_text_config(), directory)


def check_head(directory: Path, names: Iterable[str], *configs: PretrainedConfig) -> None:
    """See that the files have the head that a model needs which is not tied: its embedding would pass for it.

    Args:
        directory: for the message.
        names: of the language model's tensors.
        configs: of the model and its parts; one that says that it is tied decides.

    Raises:
        ModelError: the head is missing.
    """
    is_tied = any(getattr(config, "tie_word_embeddings", True) for config in configs)
    if not is_tied and not any(name.endswith("lm_head.weight") for name in names):
        raise ModelError(f"{directory} lacks the weights lm_head.weight; copy the model again")


def _check_surplus(keys: list[str], text: PretrainedConfig, directory: Path) -> None:
    """Weights that the model has no place for: whole layers are an error, others are named.

    Layers that predict further tokens (MTP) lie behind the last one, and the model class leaves them out.
    """
    if not keys:
        return
    known = getattr(text, "num_hidden_layers", None)
    numbers = [int(found[1]) for key in keys if (found := LAYER_OF_KEY.search(key))]
    if isinstance(known, int) and any(number >= known + _num_mtp_layers(text) for number in numbers):
        raise ModelError(
            f"{directory} holds weights of {max(numbers) + 1} layers, and its config.json says num_hidden_layers="
            f"{known}; config.json and weights do not belong together"
        )
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    logger.warning("%s: the model has no place for the weights %s%s", directory, ", ".join(keys[:3]), more)


def _num_mtp_layers(text: PretrainedConfig) -> int:
    stated = [getattr(text, name, None) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    return max((count for count in stated if isinstance(count, int)), default=0)


def build_dummy(
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: str | torch.device,
    seed: int,
    trust_remote_code: bool,
    name: str,
) -> nn.Module:
    """Random weights, drawn where they will be used (nowhere on `meta`). The caller's random state stays as it was.

    Raises:
        ModelError: too large for the device, or not a config that makes a model.
    """
    target = torch.device(device)
    free = 0 if target.type == "meta" else free_bytes(target)
    if target.type == "cpu":
        check_host(name, config, dtype, free, trust_remote_code)
    try:
        with torch.random.fork_rng([target] if target.type == "cuda" else []), target:
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32 if dtype == "auto" else dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",
            )
    # Anything: a config may be valid field by field and still not make a model.
    except Exception as error:
        if is_out_of_memory(error):
            raise does_not_fit(name, config, dtype, target, free, trust_remote_code) from error
        raise ModelError(f"{name} cannot be built from its config: {one_line(error)}") from error


def check_host(
    name: str, config: PretrainedConfig, dtype: torch.dtype | str, free: int, trust_remote_code: bool
) -> None:
    """Refuse what this machine cannot hold: it would promise the memory, and kill the process that takes it."""
    num_weights = _num_weights(name, config, dtype, trust_remote_code)
    if num_weights * element_type(dtype).itemsize > free:
        raise _too_large(name, num_weights, element_type(dtype), torch.device("cpu"), free)


def does_not_fit(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device,
    free: int,
    trust_remote_code: bool,
    load: PackedLoad | None = None,
) -> ModelError:
    """What to say of weights for which `device` has no memory; `free`: bytes, before they were read."""
    num_weights = _num_weights(name, config, dtype, trust_remote_code)
    if load is not None and load.kept:
        num_bytes = num_weights * element_type(dtype).itemsize - load.saved_bytes(element_type(dtype))
        return ModelError(
            f"{name} does not fit in the memory of {device}: its weights take {size_text(num_bytes)} packed, and "
            f"{size_text(free)} were free; take a smaller model, or a device with more memory free"
        )
    return _too_large(name, num_weights, element_type(dtype), device, free)


def _num_weights(name: str, config: PretrainedConfig, dtype: torch.dtype | str, trust_remote_code: bool) -> int:
    module = build_dummy(config, element_type(dtype), "meta", 0, trust_remote_code, name)
    return sum(parameter.numel() for parameter in module.parameters())


def element_type(dtype: torch.dtype | str) -> torch.dtype:
    """Of a module that is made without its files: float32 where they were to say it."""
    return torch.float32 if isinstance(dtype, str) else dtype


def _too_large(name: str, num_weights: int, dtype: torch.dtype, device: torch.device, free: int) -> ModelError:
    way = "take a smaller model, or a device with more memory free"
    if dtype.itemsize == 4 and num_weights * 2 < free:
        way = f"set engine.dtype=bfloat16, in which they take {size_text(num_weights * 2)}"
    return ModelError(
        f"{name} does not fit in the memory of {device}: its weights take {size_text(num_weights * dtype.itemsize)} in "
        f"{str(dtype).removeprefix('torch.')}, and {size_text(free)} were free; {way}"
    )
