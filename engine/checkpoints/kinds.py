"""Which kinds of checkpoints can be run, as far as config.json says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.images import NAMES, reads_images
from kvarena.engine.errors import ModelError

# transformers turns these into plain weights while it reads them.
DEQUANTIZED = ("fp8", "mxfp4")
METHODS = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "aqlm": "AQLM"}
# Read as they are packed (engine/checkpoints/packed.py).
PACKED_METHODS = ("awq", "gptq", "compressed-tensors")
READ_METHODS = (*PACKED_METHODS, *DEQUANTIZED)
# What a user may ask for: these, and what is made of plain weights at load (fp8 is both).
QUANTIZATIONS = (*READ_METHODS, "int8")
# How a packed weight is called, where the config forgot to say.
PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
}
_PACKED_SUFFIXES = (".qweight", ".weight_packed")
# With a vision tower beside a text model that transformers runs alone: a test holds the list against the library.
WITH_TEXT_MODEL = frozenset(
    ("emu3", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4", "mllama", "phi4_multimodal",
     "qwen3_5", "qwen3_5_moe", "qwen4_exp")
)  # fmt: skip
_OTHER_SENSES = {
    "vision_config": "images", "visual": "images", "mm_vision_tower": "images", "vision_tower": "images",
    "vq_config": "images", "audio_config": "sound", "audio_encoder_config": "sound",
}  # fmt: skip
_OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
                "ForMaskedLM", "RewardModel", "ForRewardModeling")  # fmt: skip
_UNQUANTISED = (
    "give the model's unquantised checkpoint, with weights in bfloat16, float16 or float32 "
    f"({', '.join(READ_METHODS)} are read too)"
)


def check_kind(directory: Path, config: dict[str, Any], *, weights: bool) -> None:
    """See that a checkpoint is of a kind that can be run.

    Args:
        directory: the checkpoint's.
        config: its config.json.
        weights: its weights will be read; random ones in their place are not quantised as it says.

    Raises:
        ModelError: quantised in a way that is not read, or no text generator by itself.
    """
    if weights:
        method = quantization(config)
        if method is not None and method not in READ_METHODS:
            raise ModelError(
                f"{directory} holds weights quantised with {METHODS.get(method, method)} (its config.json says so), "
                f"which are not read; {_UNQUANTISED}"
            )
    if config.get("is_encoder_decoder") is True:
        raise ModelError(
            f"{directory} is an encoder-decoder model ({config['model_type']}); only decoders, which go on with their "
            "prompt, can be run"
        )
    said = config.get("architectures")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    if names and all(name.endswith(_OTHER_TASKS) for name in names):
        raise ModelError(
            f"{directory} holds a {names[0]}, which writes no text; give a checkpoint of a causal language model"
        )
    _check_senses(directory, config, names)


def _check_senses(directory: Path, config: dict[str, Any], names: list[str]) -> None:
    sense = next((what for key, what in _OTHER_SENSES.items() if config.get(key)), None)
    if sense is None or config["model_type"] in WITH_TEXT_MODEL or reads_images(config):
        return
    inner = config.get("text_config") or config.get("llm_config") or {}
    text = inner.get("model_type") if isinstance(inner, dict) else None
    alone = f"its language model ({text})" if isinstance(text, str) else "its language model"
    raise ModelError(
        f"{directory} is a model that reads {sense} ({names[0] if names else config['model_type']}), and {NAMES} "
        f"are the only such models here; give a text model, such as {alone} saved to a directory of its own"
    )


def check_tensor_names(directory: Path, names: Iterable[str]) -> None:
    """See that no weight is packed where the config says nothing of quantisation. Raises ModelError."""
    for name in names:
        method = next((method for suffix, method in PACKED.items() if name.endswith(suffix)), None)
        if method is not None:
            why = f"which are not read; {_UNQUANTISED}"
            if name.endswith(_PACKED_SUFFIXES):
                why = "and config.json says nothing of how, nor quantize_config.json or quant_config.json; copy it too"
            raise ModelError(f"{directory} holds weights quantised with {method} ({name}), {why}")


def quantization(config: dict[str, Any]) -> str | None:
    """How config.json says that the weights are quantised; None: they are not."""
    inner = [section for name in ("text_config", "llm_config") if isinstance(section := config.get(name), dict)]
    for section in (config, *inner):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = section.get(key)
            if not isinstance(found, dict) or not found:
                continue
            method = found.get("quant_method")
            if isinstance(method, str) and method:
                return method
            if "w_bit" in found:  # AutoAWQ's first files
                return "awq"
            if found.get("load_in_4bit") or found.get("load_in_8bit"):
                return "bitsandbytes"
            if key == "compression_config":
                return "compressed-tensors"
            return "MLX" if "group_size" in found and "bits" in found else "an unnamed method"
    return None
