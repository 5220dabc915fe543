"""InternVL on disk, as far as its small files say: transformers' own format, and the original one with remote code.

    native     InternVLForConditionalGeneration   config.json: text_config, vision_config    chat_template.jinja
    original   InternVLChatModel                  config.json: llm_config, vision_config     conversation.py

Nothing of an original's code runs: its weights are converted by name (`engine/vision/weights.py`), and its prompt is
what conversation.py says in constants, which are read and not executed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.directory import read_config, read_json
from kvarena.engine.errors import ModelError

NATIVE, ORIGINAL = "internvl", "internvl_chat"
# How the tokens around an image are called in both formats.
IMAGE_TOKEN, START_TOKEN, END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as both formats state it
_BICUBIC = 3
_INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_PARTS = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + IMAGE_TOKEN + "\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
NATIVE_TEMPLATE = (
    _PARTS + "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + text(message['content']) + "
    "'<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that this engine gives images to."""
    return config.get("model_type") in (NATIVE, ORIGINAL)


@dataclass(frozen=True)
class Tiling:
    """How an image becomes what the vision tower reads.

    Attributes:
        size: pixels of a tile's side.
        min_tiles, max_tiles: tiles of an image, the thumbnail not counted.
        thumbnail: the whole image in one more tile, where it has several.
        mean, std: of each channel, after the division by 255.
        resample: filter, as PIL numbers them.
        tokens: positions of a tile in a prompt.
    """

    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    tokens: int


def tiling(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Tiling:
    """How a checkpoint's images are cut.

    Args:
        config: its config.json.
        processor: its preprocessor_config.json, or what stands for it; may be empty.

    Raises:
        ModelError: a size is missing or does not fit another one.
    """
    vision = config.get("vision_config") or {}
    native = config.get("model_type") == NATIVE
    size = _side(vision.get("image_size", 448), "image_size")
    least, most, thumbnail = processor.get("min_patches", 1), processor.get("max_patches", 12), True
    if native and processor.get("size"):
        size = _side(processor["size"], "size")
    if not native:
        size = _side(config.get("force_image_size") or size, "force_image_size")
        least, most = config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 12)
        thumbnail = config.get("use_thumbnail") is not False
        if config.get("dynamic_image_size") is False:
            least = most = 1
    patch, ratio = _side(vision.get("patch_size", 14), "patch_size"), config.get("downsample_ratio", 0.5)
    side = size / patch * ratio
    numbers = isinstance(least, int) and isinstance(most, int)
    if not numbers or not 1 <= least <= most or side != int(side) or side < 1:
        raise ModelError(
            f"the config of images does not fit together: tiles of {size} pixels, patches of {patch}, downsample_ratio "
            f"{ratio}, {least} to {most} tiles"
        )
    return Tiling(
        size=size,
        min_tiles=least,
        max_tiles=most,
        thumbnail=thumbnail,
        mean=tuple(processor.get("image_mean") or _MEAN),
        std=tuple(processor.get("image_std") or _STD),
        resample=int(processor.get("resample") or _BICUBIC),
        tokens=int(side) ** 2,
    )


def tiling_of(directory: Path) -> Tiling:
    """How the images of a checkpoint are cut, by its files. Raises ModelError."""
    processor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            processor = read_json(directory / name)
            break
    inner = processor.get("image_processor")
    return tiling(read_config(directory), inner if isinstance(inner, dict) else processor)


def _side(value: Any, name: str) -> int:
    """The side of a square that a config gives as a number, a pair or a mapping."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ModelError(f"{name}={value} of the images' config is not the side of a square in pixels")
    return sides[0]


@dataclass(frozen=True)
class Conversation:
    """An original's prompt: `system` and its message, then each turn, all of them with `sep` behind.

    Source: conversation.py of the checkpoints (MIT licence), `SeparatorStyle.MPT`.
    """

    system_template: str
    system_message: str
    roles: tuple[str, str]
    sep: str

    def template(self, begin: str) -> str:
        """The same as a chat template; `begin` is what the tokenizer puts before a text."""
        head, tail = self.system_template.split("{system_message}")
        system, sep = _literal(head), _literal(tail + self.sep)
        user, assistant = map(_literal, self.roles)
        return (
            _PARTS + "{%- set first = messages and messages[0]['role'] == 'system' -%}"
            f"{{{{ {_literal(begin)} + {system} }}}}"
            f"{{{{ text(messages[0]['content']) if first else {_literal(self.system_message)} }}}}{{{{ {sep} }}}}"
            "{%- for message in messages[1 if first else 0:] -%}"
            f"{{%- if message['role'] == 'user' -%}}{{{{ {user} }}}}"
            f"{{%- elif message['role'] == 'assistant' -%}}{{{{ {assistant} }}}}"
            "{%- else -%}{{ raise_exception('this model knows a system message at the beginning, user and assistant') "
            "}}{%- endif -%}{{ text(message['content']) + " + _literal(self.sep) + " }}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {assistant} }}}}{{%- endif -%}}"
        )


_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_SYSTEM = "<|im_start|>system\n{system_message}"
CONVERSATIONS = {
    "internlm2-chat": Conversation(_SYSTEM, _INTERNVL2, _CHATML, "<|im_end|>"),
    "Hermes-2": Conversation(_SYSTEM, _INTERNVL2, _CHATML, "<|im_end|>"),
    "phi3-chat": Conversation("<|system|>\n{system_message}", _INTERNVL2, ("<|user|>\n", "<|assistant|>\n"), "<|end|>"),
    "internvl2_5": Conversation(_SYSTEM, _INTERNVL2_5, _CHATML, "<|im_end|>\n"),
}


def conversation(directory: Path, config: Mapping[str, Any]) -> Conversation | None:
    """The prompt of an original checkpoint: what its own conversation.py says, else what is known of the name.

    None: it has a name that is not known, or another style; the tokenizer's own template then has the word.
    """
    name = config.get("template")
    file = directory / "conversation.py"
    if file.is_file():
        with suppress(OSError, ValueError, SyntaxError, RecursionError):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                found = _stated(node) if isinstance(node, ast.Call) else {}
                if found.get("name") == name:
                    return _mpt(found)
    return CONVERSATIONS.get(str(name))


def _stated(call: ast.Call) -> dict[str, Any]:
    """The constants that `Conversation(...)` is called with; empty for another call."""
    if getattr(call.func, "id", None) != "Conversation":
        return {}
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg == "sep_style":
            found["sep_style"] = getattr(keyword.value, "attr", None)
        elif keyword.arg is not None:
            with suppress(ValueError):
                found[keyword.arg] = ast.literal_eval(keyword.value)
    return found


def _mpt(found: dict[str, Any]) -> Conversation | None:
    template, message, sep = (found.get(name, "") for name in ("system_template", "system_message", "sep"))
    roles = found.get("roles", ())
    texts = [template, message, sep, *roles] if isinstance(roles, (tuple, list)) else []
    if found.get("sep_style") != "MPT" or len(texts) != 5 or not all(isinstance(text, str) for text in texts):
        return None
    if template.count("{system_message}") != 1:
        return None
    return Conversation(template, message, (roles[0], roles[1]), sep)


def _literal(text: str) -> str:
    """`text` as a template writes it."""
    return json.dumps(text, ensure_ascii=False)


def set_chat_template(tokenizer: Any, directory: Path) -> None:
    """Give a tokenizer the template of its InternVL checkpoint; any other keeps what it has."""
    file = directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("model_type") == ORIGINAL:
        found = conversation(directory, config)
        if found is not None:
            begin = tokenizer("")["input_ids"][:1]
            tokenizer.chat_template = found.template(tokenizer.decode(begin) if begin else "")
    elif config.get("model_type") == NATIVE and not tokenizer.chat_template:
        own = directory / "chat_template.json"
        found_template = read_json(own).get("chat_template") if own.is_file() else None
        tokenizer.chat_template = found_template or NATIVE_TEMPLATE


def end_tokens(directory: Path) -> frozenset[str]:
    """What ends an answer of an original checkpoint beside the tokenizer's own end token; empty for any other."""
    config = read_json(directory / "config.json")
    found = conversation(directory, config) if config.get("model_type") == ORIGINAL else None
    return frozenset() if found is None else frozenset({found.sep.strip()})
