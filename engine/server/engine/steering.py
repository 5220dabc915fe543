"""Constraints that hold a part of an answer alone: what follows a thought, and calls of tools once they have begun.

    thought ... </think>    free, but for its length and, before a grammar, its end
    the answer              free, or under a grammar
    <tool_call> the call    held to its tools' grammar, from its beginning to its end; then free again

Nothing is computed for a free part but a search of its last characters. The grammars are llguidance's, as elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from kvarena.engine.server.engine.matchers import CompiledGrammar, MatcherConstraint

STEERED = "steered"
_TAIL = 512  # bytes of a free part in which a call is looked for to begin
_BLANKS = ("\n", "\n\n")  # what models write between a thought and their answer
_MAX_CHARACTER = 4  # bytes


def resolve(pieces: list[Any], tokenizer: Any) -> str:
    """A grammar in Lark's form.

    Args:
        pieces: parts of it, each Lark's, or `{"tag": text}` where a text stands that may be a token of its own, or
            `{"until": text}` for any text that ends in this one.
        tokenizer: llguidance's.
    """
    made: list[str] = []
    rules: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            made.append(piece)
            continue
        [(kind, text)] = piece.items()
        ids = tokenizer.tokenize_bytes(text.encode())
        is_token = len(ids) == 1 and tokenizer.is_special_token(ids[0])
        tag = f"<[{ids[0]}]>" if is_token else json.dumps(text, ensure_ascii=False)
        if kind == "tag":
            made.append(tag)
            continue
        name = f"until{len(rules)}"
        rules.append(f"{name}: /(?s:.*)/ {tag}" if is_token else f"{name}[suffix={tag}]: /(?s:.*)/")
        made.append(name)
    return "\n".join(["".join(made), *rules])


@dataclass(frozen=True)
class ThoughtSpec:
    """A thought.

    Attributes:
        open, close: what begins it and what ends it.
        forced: what ends it when its budget is used up.
        has_begun: the prompt has begun it.
        budget: most tokens of it, or None.
    """

    open: str
    close: str
    forced: str
    has_begun: bool
    budget: int | None


@dataclass
class SteeredGrammar:
    """What any number of choices follow, each from its start; the interface of `CompiledGrammar`.

    Attributes:
        thought: what comes first, or None.
        then: what the answer follows, or None.
        held: patterns that begin a call, and the grammar of its rest.
        tokenizer: llguidance's.
        eos: end-of-sequence tokens.
    """

    thought: ThoughtSpec | None
    then: CompiledGrammar | None
    held: list[tuple[re.Pattern[bytes], CompiledGrammar]]
    tokenizer: Any
    eos: list[int]
    close_ids: list[int] = field(init=False)
    open_ids: list[int] = field(init=False)
    blank_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        encode = self.tokenizer.tokenize_bytes
        thought = self.thought
        self.close_ids = [] if thought is None else encode(thought.forced.encode())
        self.open_ids = [] if thought is None else encode(thought.open.encode())
        blanks = [encode(blank.encode()) for blank in _BLANKS]
        is_json = self.then is not None and self.then.kind == "json"
        self.blank_ids = frozenset(ids[0] for ids in blanks if len(ids) == 1 and is_json)

    @property
    def is_worn(self) -> bool:
        """Whether one of its automata should be built anew for those who come."""
        return any(one.is_worn for one in (*([] if self.then is None else [self.then]), *(g for _, g in self.held)))

    def start(self) -> SteeredConstraint:
        """A constraint at the answer's start; takes microseconds."""
        return SteeredConstraint(self)


def compile_steered(
    text: str, compile_whole: Callable[[str, str], CompiledGrammar], tokenizer: Any, eos: list[int]
) -> SteeredGrammar:
    """From a constraint of the kind `steered` that `to_grammar` has been through.

    Args:
        text: JSON: a thought, what the answer follows then, and how calls are held.
        compile_whole: compiles one grammar, or raises RequestError.
        tokenizer: llguidance's.
        eos: end-of-sequence tokens.

    Raises:
        RequestError: a grammar cannot be compiled.
    """
    spec = json.loads(text)
    thought = None if spec["thought"] is None else ThoughtSpec(**spec["thought"])
    then = None if spec["then"] is None else compile_whole(*spec["then"])
    held = [
        (re.compile(pattern.encode(), re.DOTALL), compile_whole("tools", resolve(pieces, tokenizer)))
        for pattern, pieces in spec["held"]
    ]
    return SteeredGrammar(thought, then, held, tokenizer, eos)


class _State(Enum):
    START = auto()  # a thought may begin
    THOUGHT = auto()
    FORCED = auto()  # a thought is being opened or closed: each token is known
    FREE = auto()
    HELD = auto()  # in a call
    THEN = auto()  # under the answer's grammar


class SteeredConstraint:
    """A `TokenConstraint` that follows one answer."""

    def __init__(self, grammar: SteeredGrammar) -> None:
        self._grammar = grammar
        self.num_late = 0
        self._tail = b""
        self._forced: list[int] = []
        self._next = _State.FREE  # after what is forced
        self._inner: MatcherConstraint | None = None
        self._num_blanks = 0  # that may still come
        self._may_open = False
        thought = grammar.thought
        self._left = None if thought is None else thought.budget
        if thought is None:
            self._begin_answer()
        elif thought.has_begun:
            self._begin_thought()
        elif grammar.then is not None:
            self._begin_answer()
            self._may_open = bool(grammar.open_ids)
        else:
            self._state = _State.START

    @property
    def failure(self) -> str:
        """Why a grammar gave up, or an empty string."""
        return "" if self._inner is None else self._inner.failure

    @property
    def is_free(self) -> bool:
        """Whether every token may come next."""
        if self._state is _State.THOUGHT:
            return self._grammar.then is None
        return self._state in (_State.START, _State.FREE)

    def fill(self, bitmask: np.ndarray) -> None:
        """Allowed tokens."""
        if self._state in (_State.HELD, _State.THEN):
            assert self._inner is not None
            self._inner.fill(bitmask)
            if self._state is _State.HELD and self._inner.is_complete:
                self._state, self._inner, self._tail = _State.FREE, None, b""
                bitmask[:] = -1
            if self._may_open:
                self._may_open = not _allows(bitmask, self._grammar.open_ids[0])
            extra = [*(self._grammar.open_ids[:1] if self._may_open else ())]
            extra += self._grammar.blank_ids if self._num_blanks else ()
            _add(bitmask, extra)
        elif self._state is _State.FORCED:
            bitmask[:] = 0
            _add(bitmask, self._forced[:1])
        else:
            bitmask[:] = -1
            if not self.is_free:  # the answer is still to come
                for token in self._grammar.eos:
                    bitmask[token // 32] &= ~np.int32(np.uint32(1 << (token % 32)))

    def accept(self, token_id: int) -> None:
        """Follow one token."""
        state, grammar = self._state, self._grammar
        if state is _State.FORCED:
            self._forced = self._forced[1:]
            if not self._forced:
                self._go_on()
        elif state in (_State.HELD, _State.THEN):
            assert self._inner is not None
            opens, self._may_open = self._may_open and token_id == grammar.open_ids[0], False
            blank = self._num_blanks > 0 and token_id in grammar.blank_ids
            self._num_blanks = self._num_blanks - 1 if blank else 0
            if opens:
                self._force(grammar.open_ids[1:], _State.THOUGHT)
            elif not blank:
                self._inner.accept(token_id)
        else:
            self._tail += grammar.tokenizer.decode_bytes([token_id])
            if state is _State.THOUGHT:
                self._think()
            else:
                self._look()

    def _force(self, ids: list[int], then: _State) -> None:
        self._state, self._forced, self._next = _State.FORCED, ids, then
        if not ids:
            self._go_on()

    def _go_on(self) -> None:
        if self._next is _State.THOUGHT:
            self._begin_thought()
        else:
            self._begin_answer()

    # Thoughts

    def _begin_thought(self) -> None:
        self._state, self._tail, self._inner = _State.THOUGHT, b"", None
        if self._left == 0:
            self._force(self._grammar.close_ids, _State.FREE)

    def _think(self) -> None:
        """One more token of a thought is in `_tail`."""
        thought = self._grammar.thought
        assert thought is not None
        at = self._tail.find(thought.close.encode())
        if at >= 0:
            self._begin_answer(self._tail[at + len(thought.close.encode()) :])
            return
        self._tail = self._tail[-_TAIL:]
        if self._left is None:
            return
        self._left -= 1
        # Not within a character: it would be broken.
        if self._left <= 0 and (_is_whole(self._tail) or self._left <= -_MAX_CHARACTER):
            self._force(self._grammar.close_ids, _State.FREE)

    def _begin_answer(self, rest: bytes = b"") -> None:
        """The answer begins, with what the thought's last token holds of it."""
        then = self._grammar.then
        if then is None:
            self._state, self._tail = _State.FREE, rest
            self._look()
            return
        self._state, self._inner = _State.THEN, then.start()
        self._num_blanks = 0 if self._grammar.thought is None else len(_BLANKS)
        if rest.strip():
            for token in self._grammar.tokenizer.tokenize_bytes(rest):
                self._inner.accept(token)

    # Calls

    def _look(self) -> None:
        """Whether a thought or a call begins at the end of `_tail`."""
        if self._state is _State.START:
            thought = self._grammar.thought
            assert thought is not None
            opening, text = thought.open.encode(), self._tail.lstrip()
            if text.startswith(opening):
                self._begin_thought()
                return
            if opening.startswith(text):
                return
            self._state = _State.FREE
        for pattern, grammar in self._grammar.held:
            found = pattern.search(self._tail)
            if found is not None:
                self._hold(grammar, self._tail[found.end() :])
                return
        if len(self._tail) > _TAIL:
            # What begins the tail does not begin the answer any more.
            self._tail = b"\0" + self._tail[-_TAIL // 2 :]

    def _hold(self, grammar: CompiledGrammar, rest: bytes) -> None:
        """A call has begun, and its first token holds `rest` of what follows; one that cannot go on is no call."""
        inner = grammar.start()
        ids = self._grammar.tokenizer.tokenize_bytes(rest) if rest else []
        self._tail = b"\0"
        if inner.allows(ids):
            self._state, self._inner = _State.HELD, inner
            for token in ids:
                inner.accept(token)


def _allows(bitmask: np.ndarray, token: int) -> bool:
    return bool(int(bitmask[token // 32]) >> (token % 32) & 1)


def _add(bitmask: np.ndarray, tokens: Any) -> None:
    for token in tokens:
        bitmask[token // 32] |= np.int32(np.uint32(1 << (token % 32)))


def _is_whole(data: bytes) -> bool:
    """Whether a text does not end within a character."""
    for size in range(1, min(_MAX_CHARACTER, len(data) + 1)):
        byte = data[-size]
        if byte >= 0xC0:  # it begins one
            return size >= (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return True
    return True
