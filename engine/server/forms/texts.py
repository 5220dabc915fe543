"""Parsers of the tool calls that a model writes of its own accord, found while it streams.

tagged   <tool_call>{"name": "f", "arguments": {...}}</tool_call>   any number, after any text (Hermes, Qwen);
         [TOOL_CALLS][{"name": "f", "arguments": {...}}]            without a closing tag (Mistral)
bare     {"name": "f", "parameters": {...}}                         the whole answer, several joined by ; (Llama 3)
         with or without <|python_tag|> before it
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from typing_extensions import override

from kvarena.engine.server.forms.calls import BETWEEN, Parsed, Part, ToolCall, ToolParser, parts_of, read_calls

_JSON_BEGINS = ("{", "[")


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0


class _Scan:
    """Follows JSON in a text that grows, and finds what lies outside its strings.

    Args:
        at: where it begins.
        tags: what is looked for outside strings; none: the end of the first object or list.
        has_strings: False looks for tags everywhere.
    """

    _INSIDE = re.compile(r'["\\]')

    def __init__(self, at: int, tags: Sequence[str] = (), has_strings: bool = True) -> None:
        self._at, self._in_string, self._depth = at, False, 0
        self._longest = max(map(len, tags), default=1)
        parts = [re.escape(tag) for tag in tags] or [r"[{}\[\]]"]
        self._outside = re.compile("|".join(['"', *parts] if has_strings else parts))
        self._finds_tags = bool(tags)

    def find(self, text: str) -> tuple[int, int] | None:
        """Begin and end of the first tag, or twice the end of the value; None while it has not come."""
        while True:
            found = (self._INSIDE if self._in_string else self._outside).search(text, self._at)
            if found is None:
                # A tag may be cut.
                kept = 0 if self._in_string else self._longest - 1
                self._at = max(self._at, len(text) - kept)
                return None
            self._at = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self._at += 1  # what is escaped
            elif self._finds_tags:
                return found.span()
            else:
                self._depth += 1 if found[0] in _JSON_BEGINS else -1
                if self._depth <= 0:
                    return self._at, self._at


class TaggedParser(ToolParser):
    """Calls between tags, or after one.

    A block ends at the closing tag, or at the next opening one; in its JSON strings both are text. A block that is no
    call is shown, up to its first tag of all, and what follows is read on; there, as far as it was searched in vain,
    strings do not count, so that no text is searched more than twice. Models that stop right after the JSON leave the
    closing tag out: the end of the text closes a block, too. White space around calls is no text.

    Args:
        names: the request's tools.
        open_tag, close_tag: of a block; without a closing tag a block is one JSON value.
    """

    def __init__(self, names: Collection[str], open_tag: str = "<tool_call>", close_tag: str = "</tool_call>") -> None:
        self._names, self._open, self._close = names, open_tag, close_tag
        self._tags = [close_tag, open_tag] if close_tag else []
        self._any_tag = re.compile("|".join(map(re.escape, self._tags or [open_tag])))
        self._held, self._blank, self._is_blank, self._has_calls = "", "", True, False
        self._is_open = False
        self._scan: _Scan | None = None
        self._num_searched = 0  # characters of `_held` in which strings do not count

    @override
    def runs_on(self, text: str) -> type[str] | None:
        return str if not self._held and not self._is_blank and self._open[0] not in text else None

    @override
    def add(self, text: str) -> Parsed:
        if text and self.runs_on(text):
            return Parsed((text,))
        self._held += text
        return self._read(False)

    @override
    def end(self) -> Parsed:
        parsed = self._read(True)
        return parsed if self._has_calls or not self._is_blank else parts_of(*parsed, self._blank)

    def _read(self, is_end: bool) -> Parsed:
        made: list[Part] = []
        while self._held:
            if not self._is_open:
                start = self._held.find(self._open)
                self._is_open = start >= 0
                if start < 0:
                    start = len(self._held) - (0 if is_end else overlap(self._held, self._open))
                made.append(self._shown(self._take(start)))
                if not self._is_open:
                    break
            span = self._block_end(is_end)
            if span is None:
                break
            self._end_block(*span, made)
        return parts_of(*made)

    def _calls(self, body: str) -> list[ToolCall] | None:
        """The calls that a block holds, or None when it is no such block."""
        return read_calls(body, self._names, needs_arguments=False)

    def _end_block(self, end: int, after: int, made: list[Part]) -> None:
        """The block's body ends at `end`, and the text goes on at `after`."""
        self._is_open, self._scan = False, None
        found = self._calls(self._held[len(self._open) : end])
        if found is not None:
            self._take(after)
            made += found
            self._has_calls, self._is_blank, self._blank = True, True, ""
            return
        # Its quotes may have misled the search for tags outside strings.
        self._num_searched = max(self._num_searched, end)
        first = self._any_tag.search(self._held, len(self._open), after)
        if first is not None:
            after = first.end() if first[0] == self._close else first.start()
        made.append(self._shown(self._take(after)))

    def _block_end(self, is_end: bool) -> tuple[int, int] | None:
        """Where the body ends and where the text goes on; None while it is not known."""
        start = len(self._open)
        if self._scan is None:
            body = self._held[start:]
            if not body.strip() and not is_end:
                return None
            at = self._json_at(body, is_end)
            if at is None:
                return None
            is_json = body.startswith(_JSON_BEGINS, at)
            if not is_json and not self._close:
                return start, start
            counts = is_json and not self._num_searched
            self._scan = _Scan(start + at, self._tags if counts else self._tags or [self._open], counts)
        found = self._scan.find(self._held)
        if found is None:
            return (len(self._held), len(self._held)) if is_end else None
        end, after = found
        return (end, after) if self._held[end:after] == self._close else (end, end)

    def _json_at(self, body: str, is_end: bool) -> int | None:  # noqa: ARG002 - of blocks that begin with a name
        """Where a block's JSON begins, if it holds some; None while it is not known."""
        return len(body) - len(body.lstrip())

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        self._num_searched = max(0, self._num_searched - size)
        return taken

    def _shown(self, text: str) -> str:
        """White space waits for text; a call drops it."""
        if self._is_blank:
            text = self._blank + text
            self._is_blank = not text.strip()
            self._blank = text if self._is_blank else ""
        return "" if self._is_blank else text


class BareParser(ToolParser):
    """A whole answer of JSON. The answer is text as soon as anything in it is no call of a tool.

    Args:
        names: the request's tools.
    """

    _TAG = "<|python_tag|>"

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held, self._is_text = names, "", False
        self._calls: list[ToolCall] = []
        self._at = 0  # what is before it has been read
        self._scan: _Scan | None = None

    @override
    def runs_on(self, text: str) -> type[str] | None:
        return str if self._is_text else None

    @override
    def add(self, text: str) -> Parsed:
        if self._is_text:
            return parts_of(text)
        self._held += text
        while self._has_begun():
            assert self._scan is not None
            found = self._scan.find(self._held)
            if found is None:
                break
            calls = read_calls(self._held[self._at : found[0]], self._names, needs_arguments=True)
            if calls is None:
                self._is_text = True
                break
            self._calls += calls
            self._at, self._scan = found[0], None
        return parts_of(self._release()) if self._is_text else Parsed()

    def _has_begun(self) -> bool:
        """Whether a value has begun at `_at`; sets `_is_text` when something else has."""
        if self._scan is not None:
            return True
        rest = self._held[self._at :]
        rest = rest.lstrip(BETWEEN if self._at else None)
        if self._at == 0:
            if self._TAG.startswith(rest):
                return False
            rest = rest.removeprefix(self._TAG).lstrip()
        if not rest:
            return False
        self._is_text = not rest.startswith(_JSON_BEGINS)
        self._at = len(self._held) - len(rest)
        self._scan = None if self._is_text else _Scan(self._at)
        return not self._is_text

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held

    @override
    def end(self) -> Parsed:
        held, calls = self._release(), self._calls
        return parts_of(*calls) if calls and self._scan is None and not self._is_text else parts_of(held)


class HiddenTokens(ToolParser):
    """Leaves special tokens that another parser had to see out of the text that it shows.

    Args:
        parser: the other one.
        hidden: what the tokens look like.
    """

    def __init__(self, parser: ToolParser, hidden: Sequence[str]) -> None:
        self._parser, self._hidden, self._held = parser, hidden, ""
        # The longest first: one may begin another.
        self._pattern = re.compile("|".join(map(re.escape, sorted(hidden, key=len, reverse=True))))
        self._begins = frozenset(text[0] for text in hidden)
        self._longest = max(map(len, hidden))

    @override
    def runs_on(self, text: str) -> type[str] | None:
        return self._parser.runs_on(text) if not self._held and self._begins.isdisjoint(text) else None

    @override
    def add(self, text: str) -> Parsed:
        return self._without(self._parser.add(text), False)

    @override
    def end(self) -> Parsed:
        return self._without(self._parser.end(), True)

    def _without(self, parsed: Parsed, is_end: bool) -> Parsed:
        made: list[Part] = []
        for part in parsed:
            if type(part) is str:
                made.append(self._strip(part, False))
            else:  # what was held is followed by no text
                made += [self._strip("", True), part]
        if is_end:
            made.append(self._strip("", True))
        return parts_of(*made)

    def _strip(self, text: str, is_end: bool) -> str:
        text = self._held + text
        kept = len(text) if is_end else self._first_open(text)
        made, at = [], 0
        for found in self._pattern.finditer(text):
            if found.start() >= kept:
                break
            made.append(text[at : found.start()])
            at = found.end()
        made.append(text[at : max(at, kept)])
        self._held = text[max(at, kept) :]
        return "".join(made)

    def _first_open(self, text: str) -> int:
        """Where the first token begins that more text may complete."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._begins and any(
                len(one) > len(text) - at and one.startswith(text[at:]) for one in self._hidden
            ):
                return at
        return len(text)
