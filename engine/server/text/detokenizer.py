"""From tokens to text and to the names of tokens.

What a stream gives is the tokenizer's own decode, in constant time for each token; see `streams.py`. Whether a
decoder is of a known form is read from it and tried against the tokenizer's own `decode`; any other tokenizer is
decoded through a window of the last tokens.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from kvarena.engine.server.text.decoders import Form, read_form
from kvarena.engine.server.text.filters import CleanUpFilter, PromptFilter, StripFilter
from kvarena.engine.server.text.streams import MAX_HELD_RUN, ByteStream, PieceStream, TextStream
from kvarena.engine.server.text.window_stream import WindowStream

_NUM_TRIALS = 80
_SAMPLES = (
    "Hello, world! It 's 1, 2 and 3 .",
    " leading space, trailing space ",
    '{"na\u00efve": "caf\u00e9 \u2615", "zh": "\u4f60\u597d"}',
    "emoji \U0001f469\u200d\U0001f680 and tabs\tand\nlines",
)


class Tokenizer(Protocol):
    """What is used of a `transformers` tokenizer."""

    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ..., **kwargs: bool) -> str:
        """Text of tokens."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Vocabulary entries."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids of vocabulary entries."""
        ...


class Detokenizer:
    """Makes text streams for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._tokens: list[str | None] = list(tokenizer.convert_ids_to_tokens(list(range(size))))
        # `all_special_ids` names only tokens with a role (end, padding); `decode` also leaves out those marked special.
        marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(marked | set(tokenizer.all_special_ids))
        self._keeps = False
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._form: Form | None = None
        if backend is not None:
            if type(backend.model).__name__ == "BPE":  # transformers leaves their blanks alone unless it is forced
                name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
                self._cleans_up = self._cleans_up and bool(getattr(tokenizer, name, False))
            self._form = read_form(backend.decoder, self._tokens)
            if self._form is not None and not self._agrees():
                self._form = None
        self._apart = self._find_apart()

    def keeping(self, token_ids: frozenset[int]) -> Detokenizer:
        """One that keeps these special tokens in every text."""
        if not token_ids:
            return self
        made = copy.copy(self)
        made._special, made._keeps = self._special - token_ids, True
        return made

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> TextStream:
        """A stream of the text that goes on from a prompt.

        It gives the decode of prompt and output less what that has in common with the decode of the prompt. So a
        character begun in the prompt comes whole, and one that the prompt leaves broken is no part of the output.

        Args:
            skip_special_tokens: leave special tokens out.
            context: the prompt's tokens.
        """
        if not context:
            return self._new(skip_special_tokens)
        _, stream = self.begin(self._tail(context, skip_special_tokens), skip_special_tokens)
        ends = stream.ends()
        if any(ends):
            stream.filters = [*stream.filters, PromptFilter(ends)]
        return stream

    def begin(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> tuple[str, TextStream]:
        """The text of tokens as far as nothing that follows can change it, and the stream of what follows."""
        if self._form is None and token_ids:
            ids = list(token_ids)
            window = WindowStream(self._decoder(skip_special_tokens), self._filters(), ids)
            text = self._decoder(skip_special_tokens)(ids)
            text = text[: len(text) - len(window.rest)]
            for one in window.filters:
                text = one.add(text)
            return text, window
        stream = self._new(skip_special_tokens)
        return stream.add(token_ids), stream

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool = True, context: Sequence[int] = ()) -> str:
        """The whole text of tokens."""
        if self._form is None and not context:
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        stream = self.stream(skip_special_tokens, context)
        return stream.add(token_ids) + stream.flush()

    def token_bytes(self, token_id: int, at_start: bool = False) -> bytes:
        """The bytes that a token adds to a text.

        Args:
            token_id: any id; one without a token has no bytes.
            at_start: the token begins the text, where it may lose a blank.
        """
        if not 0 <= token_id < len(self._tokens) or self._tokens[token_id] is None:
            return b""
        form = self._form
        if form is not None and form.bytes_of and token_id in form.bytes_of:
            byte = bytes([form.bytes_of[token_id]])
            return self._text_of_one(token_id, at_start).encode() if at_start and byte.isascii() else byte
        if form is not None and form.is_bytes:
            return form.pieces[token_id] or b""  # type: ignore[return-value]
        return self._text_of_one(token_id, at_start).encode("utf-8", "surrogatepass")

    def _text_of_one(self, token_id: int, at_start: bool) -> str:
        if self._form is not None and not at_start:
            return self._form.pieces[token_id] or ""  # type: ignore[return-value]
        alone = self.text([token_id], skip_special_tokens=False)
        if at_start or self._anchor is None:
            return alone
        before = self.text([self._anchor], skip_special_tokens=False)
        both = self.text([self._anchor, token_id], skip_special_tokens=False)
        return both.removeprefix(before) if both.startswith(before) else alone

    @functools.cached_property
    def _anchor(self) -> int | None:
        """A token of letters, to see what another adds behind it."""
        found = (i for i, token in enumerate(self._tokens) if token and token.isalpha() and i not in self._special)
        return next(found, None)

    def names(self, token_id: int, at_start: bool = False) -> Iterator[str]:
        """Names of a token, the best first: its text, its vocabulary string, its id. The last is never another's.

        A token that is no whole character is named `bytes:` and its bytes, as the OpenAI API does. Away from a text's
        start the first name is no other token's, where the decoder's form is known.
        """
        if at_start or token_id not in self._apart:
            yield self._plain_name(token_id, at_start)
        if not at_start and token_id in self._apart:
            yield self._apart[token_id]
        elif self._tokens[token_id : token_id + 1] and self._tokens[token_id] is not None:
            yield str(self._tokens[token_id])
        yield f"token_id:{token_id}"

    def names_of(self, token_ids: Iterable[int], at_start: bool = False) -> dict[int, str]:
        """A name for each of some tokens, no two alike; the first ones come first to theirs."""
        made: dict[int, str] = {}
        taken: set[str] = set()
        for token_id in token_ids:
            if token_id not in made:
                made[token_id] = next(name for name in self.names(token_id, at_start) if name not in taken)
                taken.add(made[token_id])
        return made

    def token_text(self, token_id: int, at_start: bool = False) -> str:
        """The best of a token's names."""
        return next(self.names(token_id, at_start))

    def vocabulary_string(self, token_id: int) -> str:
        """How the vocabulary writes a token; its id where there is none."""
        token = self._tokens[token_id] if token_id < len(self._tokens) else None
        return f"token_id:{token_id}" if token is None else token

    def _plain_name(self, token_id: int, at_start: bool) -> str:
        if token_id >= len(self._tokens) or self._tokens[token_id] is None:
            return f"token_id:{token_id}"
        data = self.token_bytes(token_id, at_start)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + repr(data)[2:-1]

    def _find_apart(self) -> dict[int, str]:
        """Names of the tokens whose text is that of another: byte tokens, tokens of a template, pieces of words."""
        if self._form is None:
            return {}
        added, byte_ids = self._tokenizer.added_tokens_decoder, self._form.bytes_of or {}
        taken: set[str] = set()
        others = []
        for token_id in sorted(range(len(self._tokens)), key=lambda i: (i in byte_ids, i in added)):
            name = self._plain_name(token_id, False)
            if name in taken:
                others.append(token_id)
            taken.add(name)
        made = {}
        for token_id in others:
            string = str(self._tokens[token_id])
            made[token_id] = f"token_id:{token_id}" if string in taken else string
            taken.add(made[token_id])
        return made

    def _filters(self) -> list[Any]:
        strips = [] if self._form is None else [StripFilter(strip) for strip in self._form.strips]
        clean = [CleanUpFilter(self._tokenizer.clean_up_tokenization)] if self._cleans_up else []  # type: ignore[attr-defined]
        return [*strips, *clean]

    def _new(self, skip_special_tokens: bool) -> TextStream:
        skip, form = self._special if skip_special_tokens else frozenset(), self._form
        if form is None:
            return WindowStream(self._decoder(skip_special_tokens), self._filters())
        if form.is_bytes:
            return ByteStream(form, skip, self._filters())
        return PieceStream(form, self._tokens, skip, self._filters())

    def _decoder(self, skip_special_tokens: bool) -> Any:
        skips = skip_special_tokens and not self._keeps
        decode = functools.partial(
            self._tokenizer.decode, skip_special_tokens=skips, clean_up_tokenization_spaces=False
        )
        if skips == skip_special_tokens:
            return decode
        return lambda token_ids: decode([token_id for token_id in token_ids if token_id not in self._special])

    def _tail(self, context: Sequence[int], skip_special_tokens: bool) -> Sequence[int]:
        """The end of a context from which a stream goes on as from the whole; prompts have 100,000 tokens."""
        form = self._form
        size = 2 * MAX_HELD_RUN
        while form is not None and size < len(context):
            tail = context[-size:]
            if self._settles(tail, skip_special_tokens):
                return tail
            size *= 8
        return context

    def _settles(self, tail: Sequence[int], skip_special_tokens: bool) -> bool:
        """Whether a text has certainly begun in `tail`, and a run of byte tokens not before it."""
        assert self._form is not None
        skip = self._special if skip_special_tokens else frozenset()
        byte_ids = self._form.bytes_of or {}
        whole = (t for t in reversed(tail) if t not in skip and t not in byte_ids and self.token_bytes(t).strip())
        return len(list(itertools.islice(whole, 2))) == 2

    def _agrees(self) -> bool:
        """Whether streams give the tokenizer's own text, on real text and on random tokens."""
        rng = random.Random(0)
        ids = [i for i, token in enumerate(self._tokens) if token is not None]
        byte_ids = list((self._form.bytes_of if self._form is not None else None) or ids)
        samples = [rng.choices(ids if i % 2 else byte_ids, k=i % 5) + rng.choices(ids, k=8) for i in range(_NUM_TRIALS)]
        encode = getattr(self._tokenizer, "encode", None)
        if encode is not None:
            samples += [encode(text, add_special_tokens=False) for text in _SAMPLES]
        return all(
            self.text(sample, skip) == self._tokenizer.decode(sample, skip_special_tokens=skip)
            for sample in samples
            for skip in (False, True)
        )
