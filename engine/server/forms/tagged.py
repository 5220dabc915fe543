"""Forms of calls between tags, or after one: Hermes, Mistral, DeepSeek, GLM; and the bare JSON of Llama 3."""

from __future__ import annotations

import json
import re
from typing import Any

from typing_extensions import override

from kvarena.engine.server.forms.calls import ToolCall, ToolParser, as_call
from kvarena.engine.server.forms.registry import (
    CallForm,
    Held,
    Piece,
    Tools,
    escaped,
    names_of,
    parameters_of,
    properties_of,
    quoted,
    schema_rule,
    value_pieces,
)
from kvarena.engine.server.forms.texts import BareParser, TaggedParser

PYTHON_TAG = "<|python_tag|>"
_BLANK = "WS: /[ \\n\\r\\t]{0,8}/\n"


class HermesForm(CallForm):
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`: JSON between tags, whatever they are."""

    names = ("hermes",)

    def __init__(self, open_tag: str = "<tool_call>", close_tag: str = "</tool_call>") -> None:
        self.tags = (open_tag, close_tag)
        self.seen = tuple(tag for tag in self.tags if tag)

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return TaggedParser(names_of(tools), *self.tags)

    @override
    def held(self, tools: Tools) -> list[Held]:
        pieces: list[Piece] = ["start: WS call "]
        pieces += ["WS ", {"tag": self.tags[1]}, "\n"] if self.tags[1] else ["\n"]
        return [Held(escaped(self.tags[0]), [*pieces, _calls(tools)])]


def _calls(tools: Tools) -> str:
    """Rules for one call as JSON, or a list of such."""
    rules = [
        f'one{i}: "{{" WS "\\"name\\":" WS {quoted(json.dumps(tool["function"]["name"]))} WS "," WS KEY WS '
        f'args{i} WS "}}"\nargs{i}: {schema_rule(parameters_of(tool))}\n'
        for i, tool in enumerate(tools)
    ]
    any_of = " | ".join(f"one{i}" for i in range(len(tools)))
    keys = 'KEY: "\\"arguments\\":" | "\\"parameters\\":"\n'
    return f'call: one | "[" WS one (WS "," WS one)* WS "]"\none: {any_of}\n{keys}{_BLANK}' + "".join(rules)


class MistralForm(CallForm):
    """`[TOOL_CALLS][{"name": ..., "arguments": ...}]`, and newer `[TOOL_CALLS]name[ARGS]{...}`."""

    names = ("mistral",)
    TAG, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
    tags = (TAG, "")
    seen = (TAG, ARGS, CALL_ID)

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if f"{cls.TAG}{name}" in call else None

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return MistralParser(names_of(tools))

    @override
    def held(self, tools: Tools) -> list[Held]:
        pieces: list[Piece] = ["start: WS call | " + " | ".join(f"named{i}" for i in range(len(tools))) + "\n"]
        for i, tool in enumerate(tools):
            name = quoted(tool["function"]["name"])
            pieces += [f"named{i}: {name} (", {"tag": self.ARGS}, f")? args{i}\n"]
        return [Held(escaped(self.TAG), [*pieces, _calls(tools)])]


class MistralParser(TaggedParser):
    """Reads both of Mistral's forms. A name is told from JSON by its first character."""

    _HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
    _OPEN_HEAD = re.compile(r"\s*[\w.-]*\s*(?:\[[A-Z_]*\]?\s*\w*\s*)?(?:\[[A-Z]*\]?)?\s*")

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names, MistralForm.TAG, "")

    @override
    def _json_at(self, body: str, is_end: bool) -> int | None:
        found = self._HEAD.match(body)
        if found is not None:
            return found.end()
        whole = self._OPEN_HEAD.fullmatch(body)
        return None if whole is not None and not is_end else super()._json_at(body, is_end)

    @override
    def _calls(self, body: str) -> list[ToolCall] | None:
        found = self._HEAD.match(body)
        if found is None:
            return super()._calls(body)
        return _named(found[1], body[found.end() :], self._names)


def _named(name: str, arguments: str, names: Any) -> list[ToolCall] | None:
    """A call whose name and arguments stand apart; None when it is none."""
    call = as_call({"name": name, "arguments": arguments}, names)
    return None if call is None else [call]


class LlamaForm(CallForm):
    """The whole answer is `{"name": ..., "parameters": ...}`, or several joined by `;`."""

    names = ("llama", "llama3_json", "llama4_json")
    tags = ("", "")

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return BareParser(names_of(tools))

    @override
    def held(self, tools: Tools) -> list[Held]:
        begins = rf"\A\s*(?:{escaped(PYTHON_TAG)}\s*|;\s*)?\{{\s*\"name\":\s*"
        return [
            Held(
                begins + escaped(json.dumps(tool["function"]["name"])) + r",\s*\"(?:parameters|arguments)\":",
                [f'start: WS args WS "}}"\nargs: {schema_rule(parameters_of(tool))}\n{_BLANK}'],
            )
            for tool in tools
        ]


class DeepSeekForm(CallForm):
    """DeepSeek V3's and R1's (`function`, separator, name, fenced JSON), and V3.1's (name, separator, JSON)."""

    names = ("deepseek", "deepseek_v3", "deepseek_v31")
    CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    SEPARATOR = "<｜tool▁sep｜>"
    tags = CALLS
    seen = (*CALLS, *CALL, SEPARATOR)

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if cls.SEPARATOR in call else None

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return DeepSeekParser(names_of(tools))

    @override
    def held(self, tools: Tools) -> list[Held]:
        separator: Piece = {"tag": self.SEPARATOR}
        pieces: list[Piece] = ["start: WS (" + " | ".join(f"old{i} | new{i}" for i in range(len(tools))) + ") WS "]
        pieces += [{"tag": self.CALL[1]}, "\n", _BLANK]
        for i, tool in enumerate(tools):
            name = quoted(tool["function"]["name"])
            pieces += [f'old{i}: "function" ', separator, f' {name} "\\n```json\\n" args{i} "\\n```"\n']
            pieces += [f"new{i}: {name} ", separator, f" args{i}\nargs{i}: {schema_rule(parameters_of(tool))}\n"]
        return [Held(escaped(self.CALL[0]), pieces)]


class DeepSeekParser(TaggedParser):
    """Reads a block of DeepSeek's calls."""

    _CALL = re.compile(
        rf"\s*{re.escape(DeepSeekForm.CALL[0])}\s*(?:function{DeepSeekForm.SEPARATOR}(?P<old>[^\n]+)\n```json\n"
        rf"(?P<fenced>.*?)\n```|(?P<new>[^{{\n]+?){DeepSeekForm.SEPARATOR}(?P<plain>.*?))\s*"
        rf"(?:{re.escape(DeepSeekForm.CALL[1])}\s*|\Z)",
        re.DOTALL,
    )

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names, *DeepSeekForm.CALLS)

    @override
    def _calls(self, body: str) -> list[ToolCall] | None:
        made, at = [], 0
        while at < len(body):
            found = self._CALL.match(body, at)
            if found is None:
                return None
            name, arguments = found["old"] or found["new"], found["fenced"] or found["plain"] or ""
            call = _named(name.strip(), arguments, self._names)
            if call is None:
                return None
            made += call
            at = found.end()
        return made or None


class GlmForm(CallForm):
    """GLM-4.5's: `<tool_call>name`, and a tag for each key and each value."""

    names = ("glm", "glm45", "glm47")
    tags = ("<tool_call>", "</tool_call>")
    KEY, VALUE = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")
    seen = (*tags, *KEY, *VALUE)

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if f"{cls.KEY[0]}x{cls.KEY[1]}" in call and name in call else None

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return GlmParser(tools)

    @override
    def held(self, tools: Tools) -> list[Held]:
        pieces: list[Piece] = ["start: WS (" + " | ".join(f"call{i}" for i in range(len(tools))) + ") WS "]
        pieces += [{"tag": self.tags[1]}, "\n", _BLANK]
        for i, tool in enumerate(tools):
            rules: list[Piece] = []
            pieces += [f"call{i}: {quoted(tool['function']['name'])}"]
            for j, (key, schema, needed) in enumerate(properties_of(parameters_of(tool))):
                pieces += [f" pair{i}_{j}" + ("" if needed else "?")]
                rules += [f"pair{i}_{j}: WS ", {"tag": self.KEY[0]}, f" {quoted(key)} ", {"tag": self.KEY[1]}, " WS "]
                rules += [{"tag": self.VALUE[0]}, " "]
                rules += value_pieces(schema, self.VALUE[1], f"value{i}_{j}")
            pieces += ["\n", *rules]
        return [Held(escaped(self.tags[0]), pieces)]


class GlmParser(TaggedParser):
    """Reads GLM's calls; what is no text by the tool's schema is JSON."""

    _HEAD = re.compile(r"\s*([\w.:-]+)\s*")
    _PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)

    def __init__(self, tools: Tools) -> None:
        super().__init__(names_of(tools), *GlmForm.tags)
        self._string_keys = {
            tool["function"]["name"]: {key for key, one, _ in properties_of(parameters_of(tool)) if is_string(one)}
            for tool in tools
        }

    @override
    def _calls(self, body: str) -> list[ToolCall] | None:
        head = self._HEAD.match(body)
        if head is None or head[1] not in self._names:
            return super()._calls(body)
        arguments: dict[str, Any] = {}
        at = head.end()
        while at < len(body):
            pair = self._PAIR.match(body, at)
            if pair is None:
                return None
            key, at = pair[1].strip(), pair.end()
            arguments[key] = pair[2] if key in self._string_keys[head[1]] else json_or_text(pair[2])
        call = as_call({"name": head[1], "arguments": arguments}, self._names)
        return None if call is None else [call]


def is_string(schema: Any) -> bool:
    """Whether a schema's values are texts."""
    return isinstance(schema, dict) and schema.get("type") == "string"


def json_or_text(text: str) -> Any:
    """A value as JSON, or as the text that it is otherwise."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text
