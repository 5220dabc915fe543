"""From tokens to text, one token at a time, in constant time per token, never a broken character.

Tokens of byte-level and byte-fallback vocabularies are mapped to their bytes once, at start-up; a stream then joins
bytes and decodes UTF-8 incrementally: an unfinished character waits for its rest, bytes that can never become one
turn into U+FFFD at once, and the end flushes. Whether a tokenizer is of this kind is found by trial against its own
`decode`; any other is decoded through a small window of the last tokens.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Sequence
from typing import Any, Protocol

_WINDOW_TOKENS = 6


class Tokenizer(Protocol):
    """What is used of a `transformers` tokenizer."""

    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Text of tokens."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Vocabulary entries."""
        ...

    def __len__(self) -> int: ...


class TextStream(Protocol):
    """The text of one choice as it grows."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """What is held at the end: an unfinished character becomes U+FFFD."""
        ...


class Detokenizer:
    """Makes text streams for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # `all_special_ids` names only tokens with a role (end, padding); `decode` also leaves out those marked special.
        marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(marked | set(tokenizer.all_special_ids))
        self._pieces: list[bytes] | None = None
        self._strip_first_space = False
        for strip in (False, True):
            pieces = _pieces(tokenizer, byte_level=not strip)
            if pieces is not None and _agrees(tokenizer, pieces, strip, self._special):
                self._pieces, self._strip_first_space = pieces, strip
                break

    @property
    def is_bytewise(self) -> bool:
        """True when tokens map to bytes; False when the window is used."""
        return self._pieces is not None

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> TextStream:
        """A new stream.

        Args:
            skip_special_tokens: leave special tokens out of the text.
            context: the prompt's tokens, when the stream continues them: a leading space is then kept.
        """
        skip = self._special if skip_special_tokens else frozenset()
        if self._pieces is None:
            return _WindowStream(self._tokenizer, skip_special_tokens, list(context)[-_WINDOW_TOKENS:])
        return _ByteStream(self._pieces, skip, self._strip_first_space and not context)

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool = True, context: Sequence[int] = ()) -> str:
        """The whole text of tokens, as a stream would give it."""
        stream = self.stream(skip_special_tokens, context)
        return stream.add(token_ids) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (the text's UTF-8 where a token has no bytes of its own)."""
        if self._pieces is not None and 0 <= token_id < len(self._pieces):
            return self._pieces[token_id]
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode("utf-8", "surrogatepass")


class _ByteStream:
    """Joins the bytes of tokens."""

    __slots__ = ("_decode", "_pieces", "_skip", "_strip")

    def __init__(self, pieces: list[bytes], skip: frozenset[int], strip_first_space: bool) -> None:
        self._pieces, self._skip, self._strip = pieces, skip, strip_first_space
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token_ids: Sequence[int]) -> str:
        pieces, skip = self._pieces, self._skip
        if len(token_ids) == 1 and not self._strip:
            token = token_ids[0]
            return "" if token in skip or token >= len(pieces) else self._decode(pieces[token])
        data = b"".join(pieces[t] for t in token_ids if t not in skip and t < len(pieces))
        text = self._decode(data)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


class _WindowStream:
    """Decodes the last tokens again and takes what is new. For tokenizers whose text is not a join of pieces."""

    __slots__ = ("_read", "_skip", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: list[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window = context
        self._read = len(context)

    def add(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token in token_ids:
            text += self._add_one(token)
        return text

    def _add_one(self, token: int) -> str:
        self._window.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._window) - self._read < 8:
            return ""
        self._take()
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._read], skip_special_tokens=self._skip)
        whole = self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
        return whole[len(before) :]

    def _take(self) -> None:
        del self._window[: max(0, len(self._window) - _WINDOW_TOKENS)]
        self._read = len(self._window)

    def flush(self) -> str:
        text = self._new_text() if self._read < len(self._window) else ""
        self._take()
        return text


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2's vocabulary: printable characters stand for themselves, others are shifted."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in own}
    shifted = [b for b in range(256) if b not in set(own)]
    table.update({chr(0x100 + i): b for i, b in enumerate(shifted)})
    return table


def _pieces(tokenizer: Tokenizer, byte_level: bool) -> list[bytes] | None:
    """Bytes of every token, read as byte-level, or as a vocabulary with `\u2581` for space and `<0x41>` for bytes."""
    alphabet = _byte_of_char()
    tokens: list[Any] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    pieces = []
    for token_id, token in enumerate(tokens):
        if token is None:
            pieces.append(b"")
        elif token_id in added:
            pieces.append(str(added[token_id]).encode())
        elif byte_level:
            known = all(char in alphabet for char in token)
            pieces.append(bytes(alphabet[char] for char in token) if known else token.encode())
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces.append(bytes([int(token[3:5], 16)]))
        else:
            pieces.append(token.replace("\u2581", " ").encode())
    return pieces


def _agrees(tokenizer: Tokenizer, pieces: list[bytes], strip: bool, special: frozenset[int]) -> bool:
    """Whether joined pieces give the tokenizer's own text, on real text and on random tokens that are valid UTF-8."""
    rng = random.Random(0)
    ordinary = [i for i in range(len(pieces)) if i not in special]
    samples = [rng.choices(ordinary, k=12) for _ in range(60)]
    encode = getattr(tokenizer, "encode", None)
    if encode is not None:
        samples += [encode(text, add_special_tokens=False) for text in _SAMPLES]
    agreed = 0
    for ids in samples:
        data = b"".join(pieces[i] for i in ids)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if strip:
            text = text.removeprefix(" ")
        if text != tokenizer.decode(ids, skip_special_tokens=True):
            return False
        agreed += 1
    return agreed >= 3


_SAMPLES = (
    "Hello, world! It 's 1, 2 and 3 .",
    " leading space, trailing space ",
    json.dumps({"na\u00efve": "caf\u00e9 \u2615", "zh": "\u4f60\u597d"}, ensure_ascii=False),
    "emoji \U0001f469\u200d\U0001f680 and tabs\tand\nlines",
)
