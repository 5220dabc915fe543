"""The channels of gpt-oss: each part of an answer says what it is, and for whom.

<|channel|>analysis<|message|>a thought<|end|>
<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>
<|start|>assistant<|channel|>final<|message|>the answer<|return|>
"""

from __future__ import annotations

import re

from typing_extensions import override

from kvarena.engine.server.forms.calls import Parsed, Part, Thought, ToolParser, as_call, parts_of
from kvarena.engine.server.forms.registry import (
    CallForm,
    Held,
    Piece,
    Tools,
    names_of,
    parameters_of,
    quoted,
    schema_rule,
)
from kvarena.engine.server.forms.texts import overlap

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
THOUGHTS = "analysis"


class ChannelForm(CallForm):
    """gpt-oss's calls are parts that have a recipient."""

    names = ("channels", "openai", "gptoss")
    tags = ("", "")
    seen = MARKERS

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if f"to=functions.{name}" in call else None

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return ChannelParser(names_of(tools))

    @override
    def held(self, tools: Tools) -> list[Held]:
        pieces: list[Piece] = ["start: (" + " | ".join(f"call{i}" for i in range(len(tools))) + ")\n"]
        pieces += ["header: (WORD | ", {"tag": CHANNEL}, " | ", {"tag": CONSTRAIN}, "){0,8} ", {"tag": MESSAGE}]
        pieces += ['\nWORD: " " | "commentary" | "json" | "code"\n']
        for i, tool in enumerate(tools):
            pieces += [f"call{i}: {quoted(tool['function']['name'])} header args{i} ", {"tag": ENDS[2]}, "\n"]
            pieces += [f"args{i}: {schema_rule(parameters_of(tool))}\n"]
        return [Held(r"to=functions\.", pieces)]


class ChannelParser(ToolParser):
    """Follows the parts. Text before any part, of a model that leaves the markers out, is text.

    Args:
        names: the request's tools; without any, a call is text.
    """

    _HEADER = re.compile(r"<\|(?:start|channel)\|>|(?: to=)")
    _RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
    _CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
    _END = re.compile("|".join(map(re.escape, (*ENDS, START, CHANNEL))))

    def __init__(self, names: frozenset[str]) -> None:
        self._names, self._held = names, ""
        self._header: str | None = None  # of the part that is open
        self._running: tuple[str, type[str] | None] = ("", str)  # a header, and what text below it is

    @override
    def runs_on(self, text: str) -> type[str] | None:
        header = self._header
        if header is None or self._held or "<" in text:  # with which all markers begin
            return None
        if self._running[0] != header:
            self._running = header, None if self._is_call else Thought if self._is_thought else str
        return self._running[1]

    @override
    def add(self, text: str) -> Parsed:
        self._held += text
        made: list[Part] = []
        while self._step(made, is_end=False):
            pass
        return parts_of(*made)

    @override
    def end(self) -> Parsed:
        made: list[Part] = []
        while self._held and self._step(made, is_end=True):
            pass
        if self._header is not None:
            self._close(made, self._held)
        return parts_of(*made)

    def _step(self, made: list[Part], is_end: bool) -> bool:
        """Take one thing off what is held; False when more text is needed."""
        if self._header is None:
            return self._read_header(is_end)
        found = self._END.search(self._held)
        if found is None:
            if self._is_call:
                return False
            size = len(self._held) - (0 if is_end else max(overlap(self._held, one) for one in (*ENDS, START, CHANNEL)))
            self._show(made, self._held[:size])
            self._held = self._held[size:]
            return False
        body = self._held[: found.start()]
        begins = found[0] in (START, CHANNEL)
        self._held = self._held[found.start() if begins else found.end() :]
        self._close(made, body)
        return True

    def _read_header(self, is_end: bool) -> bool:
        """Up to where a part's body begins, or text that has no header."""
        begins = self._HEADER.match(self._held)
        if begins is None:
            may_begin = any(marker.startswith(self._held) for marker in (START, CHANNEL, " to=", *ENDS))
            if may_begin and not is_end:
                return False
            skipped = next((marker for marker in ENDS if self._held.startswith(marker)), "")
            if skipped:
                self._held = self._held[len(skipped) :]
                return bool(self._held)
            self._header = ""
            return True
        at = self._held.find(MESSAGE)
        if at < 0:
            if not is_end:
                return False
            if self._held.startswith(" "):
                self._header = ""  # it only looked like one
                return True
            self._held = ""  # cut within a header: no text of the answer
            return False
        self._header, self._held = self._held[:at], self._held[at + len(MESSAGE) :]
        return True

    @property
    def _is_call(self) -> bool:
        found = self._RECIPIENT.search(self._header or "")
        return found is not None and found[1] in self._names

    @property
    def _is_thought(self) -> bool:
        channel = self._CHANNEL.search(self._header or "")
        return channel is not None and channel[1] == THOUGHTS

    def _show(self, made: list[Part], text: str) -> None:
        made.append(Thought(text) if self._is_thought else text)

    def _close(self, made: list[Part], body: str) -> None:
        """The open part has ended."""
        recipient = self._RECIPIENT.search(self._header or "")
        call = as_call({"name": recipient[1], "arguments": body}, self._names) if recipient is not None else None
        if call is not None:
            made.append(call)
        elif body:
            self._show(made, body)
        self._header = None
