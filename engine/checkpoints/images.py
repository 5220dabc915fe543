"""Models that read images, as far as their small files say: which they are, and what their prompts have of an image.

    family       model type                     around an image
    InternVL     internvl, internvl_chat        <img> <IMG_CONTEXT> ... </img>, of which the template has the middle
    Qwen         qwen2_5_vl, qwen3_vl           <|image_pad|> ..., between tokens that the template has already

What a family does with pixels is in `engine/vision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.engine.checkpoints import internvl
from kvarena.engine.checkpoints.directory import read_json

INTERNVL = (internvl.NATIVE, internvl.ORIGINAL)
QWEN2_5, QWEN3 = "qwen2_5_vl", "qwen3_vl"
QWEN = (QWEN2_5, QWEN3)
NAMES = "InternVL, Qwen2.5-VL and Qwen3-VL"


class Marker(NamedTuple):
    """A token of a prompt: its usual name, and the attribute of a tokenizer that knows a better one."""

    name: str
    attribute: str


class Markers(NamedTuple):
    """What a prompt has of an image: `image`, as often as it has positions, and what the template leaves out."""

    image: Marker
    before: Marker | None = None
    behind: Marker | None = None


_INTERNVL = Markers(
    Marker(internvl.IMAGE_TOKEN, "context_image_token"),
    Marker(internvl.START_TOKEN, "start_image_token"),
    Marker(internvl.END_TOKEN, "end_image_token"),
)
_QWEN = Markers(Marker("<|image_pad|>", "image_token"))


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that this engine gives images to."""
    return config.get("model_type") in (*INTERNVL, *QWEN)


def has_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class for the whole of such a model, in the very format."""
    return reads_images(config) and config["model_type"] != internvl.ORIGINAL


def markers(config: Mapping[str, Any]) -> Markers:
    """The tokens around an image in prompts of such a model."""
    return _QWEN if config["model_type"] in QWEN else _INTERNVL


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of how its images are prepared; empty where it says nothing. Raises ModelError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            found = read_json(directory / name)
            inner = found.get("image_processor")
            return inner if isinstance(inner, dict) else found
    return {}


def set_chat_template(tokenizer: Any, directory: Path) -> None:
    """Give a tokenizer the template of a checkpoint that reads images; any other keeps what it has."""
    config = _config(directory)
    if not reads_images(config):
        return
    own = directory / "chat_template.json"
    if not tokenizer.chat_template and own.is_file():
        tokenizer.chat_template = read_json(own).get("chat_template")
    if config["model_type"] in INTERNVL:
        tokenizer.chat_template = internvl.template_of(tokenizer, directory, config) or tokenizer.chat_template


def end_tokens(directory: Path) -> frozenset[str]:
    """What ends an answer of a checkpoint that reads images, beside the tokenizer's own end token."""
    config = _config(directory)
    return internvl.end_tokens(directory, config) if config.get("model_type") in INTERNVL else frozenset()


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    return read_json(file) if file.is_file() else {}
