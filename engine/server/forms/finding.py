"""How a model writes tool calls: what its checkpoint says, else what its chat template makes of one.

A template that lists tools says little of how the model is to call them; a template that renders a call shows it.
So a conversation with a call is rendered, and what stands around the call's name is read:

    <tool_call>{"name": ..., "arguments": ...}</tool_call>   tagged, by these tags
    [TOOL_CALLS][{"name": ..., "arguments": ...}]            tagged, without a closing tag
    {"name": ..., "parameters": ...}                         bare
    anything else                                            the form that knows its own (`CallForm.known`)
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from kvarena.engine.server.forms.calls import FirstCallParser, ToolParser
from kvarena.engine.server.forms.channels import ChannelForm
from kvarena.engine.server.forms.pythonic import PythonicForm
from kvarena.engine.server.forms.registry import CALL_FORMS, CallForm, Tools
from kvarena.engine.server.forms.tagged import PYTHON_TAG, DeepSeekForm, GlmForm, HermesForm, LlamaForm, MistralForm
from kvarena.engine.server.forms.texts import HiddenTokens
from kvarena.engine.server.text.detokenizer import Detokenizer

logger = logging.getLogger("kvarena.front")

# The end of a prompt in which a response template looks for the beginning of the answer.
_PROMPT_TOKENS = 4096
_LISTED, _CALLED, _VALUE = "kvarena_listed", "kvarena_called", "kvarena_value"
_TAG_BEFORE = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\]|[^\s\[\]{}<>]+)\s*\Z")
_OF_THEIR_OWN = (DeepSeekForm, GlmForm, MistralForm, PythonicForm, ChannelForm)


@dataclass(frozen=True)
class ToolForm:
    """How a model writes tool calls.

    Attributes:
        form: None: calls stay text.
        kept: special tokens that the parser must see.
        hidden: what they look like; the text that is shown leaves them out.
    """

    form: CallForm | None
    kept: frozenset[int] = frozenset()
    hidden: tuple[str, ...] = ()

    def parser(self, tools: Tools, prompt: str, *, parallel: bool, hides: bool) -> ToolParser | None:
        """A parser for one choice, or None when answers are text only.

        Args:
            tools: the request's, as chat templates get them.
            prompt: the end of the prompt, from `prompt_end`.
            parallel: more than one call may be given.
            hides: special tokens are left out of the text.
        """
        if self.form is None:
            return None
        parser = self.form.parser(tools, prompt)
        if hides and self.hidden:
            parser = HiddenTokens(parser, self.hidden)
        return parser if parallel else FirstCallParser(parser)


def prompt_end(token_ids: list[int], detokenizer: Detokenizer) -> str:
    """What parsers must know of a prompt."""
    return detokenizer.text(token_ids[-_PROMPT_TOKENS:], skip_special_tokens=False)


def find_form(kind: str, tokenizer: Any) -> ToolForm:
    """The form of a model's tool calls.

    Args:
        kind: as `ServerConfig.tool_call_parser`; `auto` finds it out.
        tokenizer: the model's `transformers` tokenizer.

    Raises:
        ModelError: the checkpoint ships a response template that cannot be used.
    """
    if kind == "none":
        return ToolForm(None)
    if kind == "auto":
        form = _shipped(tokenizer) or _rendered(tokenizer)
        return ToolForm(None) if form is None else with_special_tokens(form, tokenizer)
    return with_special_tokens(call_form(kind), tokenizer)


def call_form(name: str) -> CallForm:
    """The form of a name of `--tool-call-parser`."""
    if name not in CALL_FORMS:
        # The response templates' library takes a while to import: not for a server that needs none of it.
        import kvarena.engine.server.forms.templates  # noqa: F401 - registers its forms
    return CALL_FORMS[name]()


def _shipped(tokenizer: Any) -> CallForm | None:
    """What the checkpoint's response template says, if it has one that reads calls."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    from kvarena.engine.server.forms.templates import TemplateForm, check_template

    checked = check_template(template)
    return TemplateForm(checked) if "tool_calls" in checked["fields"] else None


def _rendered(tokenizer: Any) -> CallForm | None:
    """What the chat template makes of a call."""
    text = _render_call(tokenizer)
    if text is None:
        # It knows no calls: what such models are most often taught.
        return HermesForm()
    form = read_form(text)
    if form is None:
        shown = " ".join(text.split())[:200]
        logger.warning(
            "tool calls of this model stay text: its chat template writes one as %r, which --tool-call-parser auto "
            "does not know; response_template in tokenizer_config.json can say how to read it",
            shown,
        )
    return form


def read_form(call: str) -> CallForm | None:
    """The form of a rendered call of `_CALLED`; None when it is unknown."""
    at = call.find(_CALLED)
    span = _json_around(call, at)
    if span is None:
        if f"<function={_CALLED}>" in call:
            return call_form("xml")
        found = (kind.known(call, _CALLED) for kind in _OF_THEIR_OWN)
        return next((form for form in found if form is not None), None)
    before, after = call[: span[0]].rstrip(), call[span[1] :].lstrip()
    found_tag = _TAG_BEFORE.search(before)
    if found_tag is None or before.endswith(PYTHON_TAG):
        return LlamaForm() if not before or before.endswith(PYTHON_TAG) else None
    tag = found_tag[1]
    if tag == MistralForm.TAG:
        return MistralForm()
    closes = [tag[:i] + "/" + tag[i:] for i in (1, 2)] if tag[0] in "<[" else []
    close = next((one for one in closes if after.startswith(one)), "")
    return HermesForm(tag, close)


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


def with_special_tokens(form: CallForm, tokenizer: Any) -> ToolForm:
    """The form with the special tokens that its parser must see."""
    special = special_tokens(tokenizer)
    # A response template names what it likes, in patterns too.
    seen = special if form.sees_all else {t: i for t, i in special.items() if t in form.seen}
    return ToolForm(form, frozenset(seen.values()), tuple(seen))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that are left out of texts, by what they look like."""
    return {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
