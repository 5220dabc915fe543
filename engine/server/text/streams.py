"""Streams of text: tokens in, the text that can no longer change out.

What a stream gives, joined, is the tokenizer's own decode of its tokens. So it holds what the next token may change: an
unfinished character; a run of byte tokens, which becomes U+FFFD for every byte when one of them is wrong; a blank that
the end of a text loses. `pending` is what would come out if the stream ended now.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from kvarena.engine.server.text.decoders import Form

BROKEN = "\ufffd"
# A longer run of byte tokens is shown as it comes: a script that the vocabulary lacks altogether must not wait for the
# end. If a byte of it is wrong later, what was shown stays.
MAX_HELD_RUN = 256


class TextStream(ABC):
    """The text of one choice as it grows.

    Args:
        skip: token ids that are left out.
        filters: applied to the joined text, in this order.
    """

    def __init__(self, skip: frozenset[int], filters: Sequence[Any]) -> None:
        self._skip, self.filters, self._length = skip, filters, 0

    @abstractmethod
    def _raw(self, token_ids: Sequence[int]) -> str:
        """Text before the filters."""

    @abstractmethod
    def _raw_end(self) -> str:
        """What is held before the filters; it is then no longer held."""

    @property
    @abstractmethod
    def _holds(self) -> bool:
        """Whether tokens wait, before the filters."""

    @property
    @abstractmethod
    def _is_whole(self) -> bool:
        """False while a character is unfinished."""

    @property
    @abstractmethod
    def at_start(self) -> bool:
        """Whether the next token begins the text, so that it may lose a blank."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        text = self._raw(token_ids)
        for one in self.filters:
            text = one.add(text)
        return text

    def flush(self) -> str:
        """What is held at the end: an unfinished character becomes U+FFFD."""
        text = self._raw_end()
        for one in self.filters:
            text = one.add(text) + one.end()
        return text

    @property
    def pending(self) -> str:
        """What `flush` would give; empty while a character is unfinished."""
        if not (self._holds or any(one.holds for one in self.filters)) or not self._is_whole:
            return ""
        return self.copy().flush()

    def ends(self) -> list[str]:
        """What a reader may have seen of the tokens so far beside what came out: of a prompt whose stream goes on."""
        return [self.copy().flush()]

    def copy(self) -> TextStream:
        """A stream at the same place, for another choice of the prompt."""
        made = copy.copy(self)
        made.filters = [copy.copy(one) for one in self.filters]
        return made

    def _place(self, token: int) -> tuple[int, int]:
        """Add a token; where the text that it completes begins, and how many characters the text's start lost of it.

        Where a filter holds something, that begins there too: what becomes of it is not known yet.
        """
        raw = text = self._raw((token,))
        for one in self.filters:
            text = one.add(text)
        before = self._length
        self._length += len(text)
        return before, 0 if any(one.holds for one in self.filters) else len(raw) - len(text)

    def place(self, token: int) -> list[int]:
        """Add a token as `add` does; the places in the text of the tokens whose place is now known, in their order."""
        return [self._place(token)[0]]

    def place_end(self) -> list[int]:
        """The places that are still open at the end."""
        return []


class ByteStream(TextStream):
    """Joins bytes and decodes them."""

    def __init__(self, form: Form, skip: frozenset[int], filters: Sequence[Any]) -> None:
        super().__init__(skip, filters)
        self._pieces: list[Any] = form.pieces
        self._held = b""

    @override
    def add(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self.filters:  # nearly every step of every stream
            token = token_ids[0]
            if token in self._skip or token >= len(self._pieces):
                return ""
            data = self._held + (self._pieces[token] or b"")
            text, used = utf_8_decode(data, "replace", False)
            self._held = data[used:]
            return text
        return super().add(token_ids)

    @override
    def _raw(self, token_ids: Sequence[int]) -> str:
        pieces, skip, end = self._pieces, self._skip, len(self._pieces)
        data = self._held + b"".join([pieces[t] or b"" for t in token_ids if t < end and t not in skip])
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    @override
    def _raw_end(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")

    @property
    @override
    def _holds(self) -> bool:
        return bool(self._held)

    @property
    @override
    def _is_whole(self) -> bool:
        return not self._held

    @property
    @override
    def at_start(self) -> bool:
        return any(one.at_start for one in self.filters)

    @override
    def place(self, token: int) -> list[int]:
        held = self._held
        start, num_lost = self._place(token)
        # The token completes a character of the one before; or it shows that this one will never be complete: then
        # what was held comes first, as one U+FFFD or, of bytes that no character has, several.
        broke = held and self._length > start and not _completes(held, self._pieces[token])
        num_broken = len(held.decode("utf-8", "replace")) if broke else 0
        return [start + max(0, num_broken - num_lost)]


def _completes(held: bytes, piece: bytes) -> bool:
    """Whether `piece` goes on with the character that `held` begins."""
    size = 2 if held[0] < 0xE0 else 3 if held[0] < 0xF0 else 4
    try:
        (held + piece)[:size].decode()
    except UnicodeDecodeError:
        return False
    return True


class PieceStream(TextStream):
    """Joins pieces; runs of byte tokens wait for their end."""

    def __init__(self, form: Form, tokens: list[str | None], skip: frozenset[int], filters: Sequence[Any]) -> None:
        super().__init__(skip, filters)
        self._pieces: list[Any] = form.pieces
        self._tokens, self._first, self._of_run = tokens, form.first, form.of_run
        self._bytes_of, self._suffixed = form.bytes_of or {}, form.suffixed
        self._is_joint = False  # a blank stands here as soon as a token follows
        self._is_first = True
        self._run = b""
        self._is_open = False  # a long run, which is shown as it comes
        self._begins: list[int] = []  # of the run's tokens whose place is asked for, in bytes of it

    @override
    def copy(self) -> TextStream:
        made = super().copy()
        assert isinstance(made, PieceStream)
        made._begins = list(self._begins)
        return made

    @override
    def ends(self) -> list[str]:
        made = [self.copy().flush()]
        with contextlib.suppress(UnicodeDecodeError):
            _, used = utf_8_decode(self._run, "strict", False)
            if used < len(self._run):  # the run without the character that it ends amid
                before = self.copy()
                assert isinstance(before, PieceStream)
                before._run = self._run[:used]
                made.append(before.flush())
        return made

    @property
    @override
    def at_start(self) -> bool:
        return not self._run and (self._is_first or any(one.at_start for one in self.filters))

    @property
    @override
    def _holds(self) -> bool:
        return bool(self._run)

    @property
    @override
    def _is_whole(self) -> bool:
        if not self._run:
            return True
        try:
            self._run.decode()
        except UnicodeDecodeError:
            return False
        return True

    @override
    def _raw(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token in token_ids:
            if token in self._skip or token >= len(self._pieces) or (piece := self._pieces[token]) is None:
                continue
            byte = self._bytes_of.get(token)
            if byte is not None:
                text += self._add_byte(byte)
                continue
            if self._run or self._is_open:
                text += self._end_run()
            if self._is_first:
                self._is_first = False
                if self._first is not None:
                    piece = self._first(self._tokens[token] or "")
            text += " " + piece if self._is_joint else piece
            self._is_joint = token in self._suffixed
        return text

    def _add_byte(self, byte: int) -> str:
        self._run += bytes((byte,))
        if not self._is_open and len(self._run) <= MAX_HELD_RUN:
            return ""
        text, used = utf_8_decode(self._run, "replace", False)
        self._run, self._is_open = self._run[used:], True
        return self._piece_of_run(text)

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        if self._is_open:
            self._is_open = False
            return self._piece_of_run(run.decode("utf-8", "replace"))
        if not run:
            return ""
        try:
            return self._piece_of_run(run.decode())
        except UnicodeDecodeError:
            return "".join(self._piece_of_run(BROKEN) for _ in run)

    def _piece_of_run(self, text: str) -> str:
        if not text:
            return ""
        is_first, self._is_first = self._is_first, False
        return text if self._of_run is None else self._of_run(text, is_first)

    @override
    def _raw_end(self) -> str:
        return self._end_run()

    @override
    def place(self, token: int) -> list[int]:
        run, was_open = self._run, self._is_open
        start, num_lost = self._place(token)
        if was_open:
            return [start]
        if self._is_open:
            begins = [*self._take_begins(), len(run)]
            return [start + len(utf_8_decode(run[:at], "replace", False)[0]) for at in begins]
        if self._run:
            self._begins.append(len(run))
            return []
        if not run:
            return [start]
        begins = [*self._take_begins(), len(run)]
        return [max(start, start + _num_chars(run, at) - num_lost) for at in begins]

    @override
    def place_end(self) -> list[int]:
        run, start = self._run, self._length
        held = any(one.holds for one in self.filters)
        num_lost = 0 if held else len(self.copy()._raw_end()) - len(self.copy().flush())
        return [max(start, start + _num_chars(run, at) - num_lost) for at in self._take_begins()]

    def _take_begins(self) -> list[int]:
        begins, self._begins = self._begins, []
        return begins


def _num_chars(run: bytes, end: int) -> int:
    """Characters that the first `end` bytes of a run make."""
    try:
        run.decode()
    except UnicodeDecodeError:
        return end
    return len(run[:end].decode("utf-8", "ignore"))
