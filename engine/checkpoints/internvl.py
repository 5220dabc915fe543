"""InternVL on disk, as far as its small files say: transformers' own format, and the original one with remote code.

    native     InternVLForConditionalGeneration   config.json: text_config, vision_config    chat_template.jinja
    original   InternVLChatModel                  config.json: llm_config, vision_config     conversation.py

Nothing of an original's code runs: its weights are converted by name (`engine/vision/internvl_weights.py`), and its
prompt is what conversation.py says in constants, which are read and not executed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NATIVE, ORIGINAL = "internvl", "internvl_chat"
# How the tokens around an image are called in both formats.
IMAGE_TOKEN, START_TOKEN, END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
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


def template_of(tokenizer: Any, directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a checkpoint whose tokenizer is loaded; None: the tokenizer's own has the word."""
    if config.get("model_type") == ORIGINAL:
        found = conversation(directory, config)
        if found is None:
            return None
        begin = tokenizer("")["input_ids"][:1]
        return found.template(tokenizer.decode(begin) if begin else "")
    return None if tokenizer.chat_template else NATIVE_TEMPLATE


def end_tokens(directory: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """What ends an answer of an original checkpoint beside the tokenizer's own end token; empty for any other."""
    found = conversation(directory, config) if config.get("model_type") == ORIGINAL else None
    return frozenset() if found is None else frozenset({found.sep.strip()})
