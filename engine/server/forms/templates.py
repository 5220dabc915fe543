"""Tool calls of a checkpoint that says itself how to read its answers: transformers' response templates.

A response template names the regions of an answer (text, thoughts, calls) and what opens and closes them;
`transformers.utils.chat_parsing` follows them. Here only the regions of calls are taken out of the answer: all else is
shown as the model wrote it, as it is without tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template
from typing_extensions import override

from kvarena.engine.errors import ModelError
from kvarena.engine.server.forms.calls import Parsed, Part, ToolParser, as_call, parts_of
from kvarena.engine.server.forms.registry import (
    CallForm,
    Held,
    Piece,
    Tools,
    escaped,
    parameters_of,
    properties_of,
    quoted,
    value_pieces,
)

CALLS = "tool_calls"
# Qwen3-Coder's and Qwen3.5's own: their checkpoints ship none.
XML_TEMPLATE: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        CALLS: {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}


def check_template(template: Any) -> dict[str, Any]:
    """A response template with every field optional: a cut answer is one, too.

    Raises:
        ModelError: it cannot be used.
    """
    try:
        load_response_template(template)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"the tokenizer's response_template cannot be used: {text}") from error
    fields = {name: field | {"optional": True} for name, field in template["fields"].items()}
    return template | {"fields": fields}


class TemplateForm(CallForm):
    """A checkpoint's own response template.

    Args:
        template: from `check_template`.
    """

    tags = ("", "")
    sees_all = True

    def __init__(self, template: dict[str, Any]) -> None:
        self._template = template

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return TemplateParser(self._template, tools, prompt)


class XmlForm(TemplateForm):
    """Qwen3-Coder's and Qwen3.5's: `<tool_call><function=...><parameter=...>`."""

    names = ("xml", "qwen3_coder", "qwen3_xml")
    TAGS = ("<tool_call>", "</tool_call>")

    def __init__(self) -> None:
        super().__init__(check_template(XML_TEMPLATE))

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if f"<function={name}>" in call else None

    @override
    def held(self, tools: Tools) -> list[Held]:
        pieces: list[Piece] = ["start: WS (" + " | ".join(f"call{i}" for i in range(len(tools))) + ") WS "]
        pieces += [{"tag": self.TAGS[1]}, "\nWS: /[ \\n]{0,4}/\n"]
        for i, tool in enumerate(tools):
            rules: list[Piece] = []
            pieces += [f"call{i}: " + quoted("<function=" + tool["function"]["name"] + ">") + " WS"]
            for j, (key, schema, needed) in enumerate(properties_of(parameters_of(tool))):
                pieces += [f" value{i}_{j}" + ("" if needed else "?")]
                rules += [f"value{i}_{j}: {quoted(f'<parameter={key}>' + chr(10))} "]
                rules += value_pieces(schema, "</parameter>", f"inner{i}_{j}", "\n")
            pieces += [' "</function>"\n', *rules]
        return [Held(escaped(self.TAGS[0]), pieces)]


class TemplateParser(ToolParser):
    """Follows a response template, a character at a time: so an answer's parts do not depend on where it was cut.

    A region of calls that cannot be read, or calls what is no tool of the request, is shown as text.

    Args:
        template: from `check_template`.
        tools: as chat templates get them; the arguments' types come from their schemas.
        prompt: the end of the prompt: it may have begun the answer.
    """

    def __init__(self, template: dict[str, Any], tools: Sequence[dict[str, Any]], prompt: str) -> None:
        self._template, self._tools = load_response_template(template), tools
        self._names = frozenset(tool["function"]["name"] for tool in tools)
        begun = self._template.start_anchor_re.search(prompt) is not None
        self._begin(prompt if begun else "")

    def _begin(self, prompt: str) -> None:
        self._parser = ResponseParser(self._template, prefix=prompt, tools=[*self._tools])
        self._raw = ""  # not shown yet
        self._start = 0  # where a region of calls begins in it
        self._in_calls = any(e["type"] == "region_open" for e in self._parser.initial_events if e["field"] == CALLS)
        self._in_calls = self._in_calls and self._parser.initial_events[-1]["type"] != "region_close"

    @override
    def add(self, text: str) -> Parsed:
        made: list[Part] = []
        for char in text:
            self._raw += char
            try:
                events = self._parser.feed(char)
            except Exception:  # whatever a region's reader raises: its text is no call
                self._give_up(made)
                continue
            self._follow(events, made)
        return parts_of(*made)

    @override
    def end(self) -> Parsed:
        made: list[Part] = []
        try:
            _, events = self._parser.finalize()
        except Exception:
            self._give_up(made)
        else:
            self._follow(events, made)
            made.append(self._raw)
        self._raw = ""
        return parts_of(*made)

    def _give_up(self, made: list[Part]) -> None:
        """Show a region that could not be read, and go on behind it."""
        made.append(self._raw)
        self._begin("")

    def _follow(self, events: list[dict[str, Any]], made: list[Part]) -> None:
        """Take what the events have settled out of `_raw`."""
        for i, event in enumerate(events):
            if event["field"] != CALLS:
                continue
            if event["type"] == "region_open":
                self._in_calls = True
                opened = self._template.fields[CALLS].open_re.search(self._raw)
                made.append(self._raw[: opened.start()])
                self._raw = self._raw[opened.start() :]
            elif event["type"] == "region_close":
                self._in_calls = False
                # What the same step found behind the region.
                later = sum(len(e["text"]) for e in events[i + 1 :] if e["type"] == "region_chunk")
                self._close(event["value"], len(self._raw) - later - self._num_pending(), made)
        if not self._in_calls:
            keep = self._num_pending()
            made.append(self._raw[: len(self._raw) - keep])
            self._raw = self._raw[len(self._raw) - keep :]

    def _num_pending(self) -> int:
        """Characters that may begin a delimiter."""
        return len(self._parser._buffer) - self._parser._pos

    def _close(self, value: Any, size: int, made: list[Part]) -> None:
        values = value if isinstance(value, list) else [value]
        found = [as_call(one, self._names, needs_arguments=False) for one in values]
        if not found or None in found:
            made.append(self._raw[:size])
        else:
            made += [call for call in found if call is not None]
        self._raw = self._raw[size:]
