"""How a model writes tool calls: what its checkpoint says, else what its chat template makes of one.

A template that lists tools says little of how the model is to call them; a template that renders a call shows it.
So a conversation with a call is rendered, and what stands around the call's name is read:

    <tool_call>{"name": ..., "arguments": ...}</tool_call>   tagged, by these tags
    [TOOL_CALLS][{"name": ..., "arguments": ...}]            tagged, without a closing tag
    {"name": ..., "parameters": ...}                         bare
    <tool_call><function=...><parameter=...>                 xml
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.engine.server.forms.calls import FirstCallParser, ToolParser
from kvarena.engine.server.forms.texts import BareParser, HiddenTokens, TaggedParser
from kvarena.engine.server.text.detokenizer import Detokenizer

logger = logging.getLogger("kvarena.front")

HERMES_TAGS = ("<tool_call>", "</tool_call>")
PYTHON_TAG = "<|python_tag|>"
# The end of a prompt in which a response template looks for the beginning of the answer.
_PROMPT_TOKENS = 4096
_LISTED, _CALLED, _VALUE = "kvarena_listed", "kvarena_called", "kvarena_value"
_TAG_BEFORE = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\]|[^\s\[\]{}<>]+)\s*\Z")


@dataclass(frozen=True)
class ToolForm:
    """How a model writes tool calls.

    Attributes:
        kind: `tagged`, `bare`, `template` (a response template, which `xml` is, too) or `none`.
        tags: opening and closing tag; the latter may be empty.
        template: the response template.
        kept: special tokens that the parser must see.
        hidden: what they look like; the text that is shown leaves them out.
    """

    kind: str
    tags: tuple[str, str] = ("", "")
    template: dict[str, Any] | None = None
    kept: frozenset[int] = frozenset()
    hidden: tuple[str, ...] = ()

    def parser(self, tools: Sequence[dict[str, Any]], prompt: str, *, parallel: bool, hides: bool) -> ToolParser | None:
        """A parser for one choice, or None when answers are text only.

        Args:
            tools: the request's, as chat templates get them.
            prompt: the end of the prompt, from `prompt_end`.
            parallel: more than one call may be given.
            hides: special tokens are left out of the text.
        """
        names = frozenset(tool["function"]["name"] for tool in tools)
        parser: ToolParser
        if self.kind == "tagged":
            parser = TaggedParser(names, *self.tags)
        elif self.kind == "bare":
            parser = BareParser(names)
        elif self.kind == "template":
            from kvarena.engine.server.forms.templates import TemplateParser

            assert self.template is not None
            parser = TemplateParser(self.template, tools, prompt)
        else:
            return None
        if hides and self.hidden:
            parser = HiddenTokens(parser, self.hidden)
        return parser if parallel else FirstCallParser(parser)

    def prompt_end(self, token_ids: list[int], detokenizer: Detokenizer) -> str:
        """What `parser` must know of a prompt."""
        if self.kind != "template":
            return ""
        return detokenizer.text(token_ids[-_PROMPT_TOKENS:], skip_special_tokens=False)


def find_form(kind: str, tokenizer: Any) -> ToolForm:
    """The form of a model's tool calls.

    Args:
        kind: as `ServerConfig.tool_call_parser`; `auto` finds it out.
        tokenizer: the model's `transformers` tokenizer.

    Raises:
        ModelError: the checkpoint ships a response template that cannot be used.
    """
    if kind == "auto":
        form = _shipped(tokenizer) or _rendered(tokenizer)
    elif kind == "xml":
        form = _of_template(_xml_template())
    else:
        made = {
            "hermes": ToolForm("tagged", HERMES_TAGS),
            "mistral": ToolForm("tagged", ("[TOOL_CALLS]", "")),
            "llama": ToolForm("bare"),
            "none": ToolForm("none"),
        }
        form = made[kind]
    return _with_special_tokens(form, tokenizer)


def _xml_template() -> dict[str, Any]:
    from kvarena.engine.server.forms.templates import XML_TEMPLATE

    return XML_TEMPLATE


def _of_template(template: Any) -> ToolForm:
    from kvarena.engine.server.forms.templates import check_template

    return ToolForm("template", template=check_template(template))


def _shipped(tokenizer: Any) -> ToolForm | None:
    """What the checkpoint's response template says, if it has one that reads calls."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    form = _of_template(template)
    assert form.template is not None
    return form if "tool_calls" in form.template["fields"] else None


def _rendered(tokenizer: Any) -> ToolForm:
    """What the chat template makes of a call."""
    text = _render_call(tokenizer)
    if text is None:
        # It knows no calls: what such models are most often taught.
        return ToolForm("tagged", HERMES_TAGS)
    form = read_form(text)
    if form is None:
        shown = " ".join(text.split())[:200]
        logger.warning(
            "tool calls of this model stay text: its chat template writes one as %r, which --tool-call-parser auto "
            "does not know; response_template in tokenizer_config.json can say how to read it",
            shown,
        )
        return ToolForm("none")
    return form


def read_form(call: str) -> ToolForm | None:
    """The form of a rendered call of `_CALLED`; None when it is unknown."""
    at = call.find(_CALLED)
    span = _json_around(call, at)
    if span is None:
        return _of_template(_xml_template()) if f"<function={_CALLED}>" in call else None
    before, after = call[: span[0]].rstrip(), call[span[1] :].lstrip()
    found = _TAG_BEFORE.search(before)
    if found is None or before.endswith(PYTHON_TAG):
        return ToolForm("bare") if not before or before.endswith(PYTHON_TAG) else None
    tag = found[1]
    closes = [tag[:i] + "/" + tag[i:] for i in (1, 2)] if tag[0] in "<[" else []
    close = next((one for one in closes if after.startswith(one)), "")
    return ToolForm("tagged", (tag, close))


def _json_around(text: str, at: int) -> tuple[int, int] | None:
    """Where the widest JSON value begins and ends that holds the call and its arguments."""
    decoder = json.JSONDecoder()
    for start in (i for i, char in enumerate(text[:at]) if char in "{["):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if end > at and '"name"' in text[start:end] and _VALUE in json.dumps(value):
            return start, end
    return None


def _render_call(tokenizer: Any) -> str | None:
    """An assistant's turn that is a call, as the chat template writes it; None where it does not write calls."""
    schema = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    tools = [{"type": "function", "function": {"name": _LISTED, "description": "d", "parameters": schema}}]
    user = {"role": "user", "content": "Hi"}
    for arguments in ({"x": _VALUE}, json.dumps({"x": _VALUE})):
        function = {"name": _CALLED, "arguments": arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        for content in ("", None):
            turn = {"role": "assistant", "content": content, "tool_calls": [call]}
            text = _render(tokenizer, [user, turn], tools)
            if text is None or _CALLED not in text:
                continue
            plain = _render(tokenizer, [user, {"role": "assistant", "content": "Ok"}], tools) or ""
            asked = _render(tokenizer, [user], tools, add_generation_prompt=True) or ""
            start = max(_num_alike(text, other) for other in (plain, asked))
            return text[min(start, text.find(_CALLED)) :]
    return None


def _num_alike(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **flags: Any) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **flags))
    except Exception:  # a template refuses in any way it likes; another rendering may do
        return None


def _with_special_tokens(form: ToolForm, tokenizer: Any) -> ToolForm:
    """The form with the special tokens that its parser must see."""
    special = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if form.kind == "template":
        seen = special
    else:
        seen = {text: token_id for text, token_id in special.items() if text in form.tags}
    return ToolForm(form.kind, form.tags, form.template, frozenset(seen.values()), tuple(seen))
