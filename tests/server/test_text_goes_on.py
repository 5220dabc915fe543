"""What is shown of an answer is the tokenizer's own decode of prompt + output, whatever the tokenizer and the cuts."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import MAX_HELD_RUN
from kvarena.engine.server.text.window_stream import WindowStream
from tests import tokenizer_kinds

NUM_EXAMPLES = 40
TEXTS = ("the a", " the", "\u4f60\u597d \u00e9.", "\U0001f680 the's b", "the\nthe , b ' a n't")


@functools.cache
def made(kind):
    tokenizer = kind()
    return tokenizer, Detokenizer(tokenizer)


# What a token adds depends on its neighbours.
_DEPENDS_ON_NEXT = (tokenizer_kinds.unigram_cleaned, tokenizer_kinds.wordpiece_cleaned, tokenizer_kinds.suffix_bpe)


def some_ids(tokenizer):
    """Random tokens, those of texts, and runs of bytes; beyond the vocabulary, where embeddings are padded, too."""
    size = len(tokenizer)
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    low = st.lists(st.integers(0, min(size - 1, 258)), max_size=12)
    parts = st.one_of(st.lists(st.integers(0, size + 3), max_size=8), low, st.sampled_from(texts))
    return st.lists(parts, max_size=4).map(lambda lists: [token for one in lists for token in one])


def behind(start, text):
    """`text` behind what it has in common with `start`."""
    pairs = enumerate(zip(start, text, strict=False))
    return text[next((i for i, (a, b) in pairs if a != b), min(len(start), len(text))) :]


@pytest.mark.parametrize("kind", tokenizer_kinds.EXACT, ids=lambda kind: kind.__name__)
def test_answers_go_on_from_their_prompts(kind):
    tokenizer, detokenizer = made(kind)
    assert not isinstance(detokenizer.stream(), WindowStream)

    @settings(max_examples=NUM_EXAMPLES, deadline=None)
    @given(ids=some_ids(tokenizer), data=st.data())
    def check(ids, data):
        skip = data.draw(st.booleans())
        cut = data.draw(st.integers(0, len(ids)))
        prompt, output = ids[:cut], ids[cut:]
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        begun, rest = detokenizer.begin(prompt, skip)
        pieces, given_so_far, at = [], begun, 0
        stream = rest.copy()
        while at < len(output):
            step = data.draw(st.integers(1, 3))
            pieces.append(stream.add(output[at : at + step]))
            at += step
            given_so_far += pieces[-1]
            if stream.pending:  # what would be shown if it ended here
                ended = tokenizer.decode(prompt + output[:at], skip_special_tokens=skip)
                assert given_so_far + stream.pending == ended
        text = "".join(pieces) + stream.flush()
        assert begun + text == whole  # echo
        alone = tokenizer.decode(prompt, skip_special_tokens=skip)
        assert alone.startswith(begun)
        amid = 4 if alone.endswith("\ufffd") else 1
        # Nor is the part of a run of bytes before the character that the prompt ends amid.
        alone_of = [tokenizer.decode(prompt[: max(0, cut - i)], skip_special_tokens=skip) for i in range(amid)]
        expected = min((behind(one, whole) for one in alone_of), key=len)
        assert detokenizer.text(output, skip, prompt) == expected
        other = detokenizer.stream(skip, prompt)
        assert "".join(other.add([token]) for token in output) + other.flush() == expected

    check()


@pytest.mark.parametrize("kind", tokenizer_kinds.EXACT, ids=lambda kind: kind.__name__)
def test_tokens_are_named_apart_and_lie_where_their_text_does(kind):
    tokenizer, detokenizer = made(kind)
    static = [detokenizer.token_text(token) for token in range(len(tokenizer) + 3)]
    assert len(set(static)) == len(static)
    assert not any("\ufffd" in name for name in static)

    @settings(max_examples=NUM_EXAMPLES, deadline=None)
    @given(ids=some_ids(tokenizer), data=st.data())
    def check(ids, data):
        cut = data.draw(st.integers(0, len(ids)))
        stream = detokenizer.stream(True, ids[:cut])
        text = detokenizer.text(ids[cut:], True, ids[:cut])
        places, starts = [], []
        for token in ids[cut:]:
            starts.append(stream.at_start)
            places += stream.place(token)
            assert len(places) <= len(starts)
        places += stream.place_end()
        assert len(places) == len(ids) - cut
        assert places == sorted(places)
        assert all(place <= len(text) for place in places)
        if kind in _DEPENDS_ON_NEXT:
            return
        special = detokenizer._special
        for token, at_start, place in zip(ids[cut:], starts, places, strict=True):
            data_of_it = detokenizer.token_bytes(token, at_start)
            if token in special or token >= len(tokenizer):
                continue
            try:
                name = data_of_it.decode()
            except UnicodeDecodeError:
                continue
            shown = text[place : place + len(name)]
            assert shown == name or set(shown) == {"\ufffd"}

    check()


def test_a_token_behind_bytes_of_no_character_lies_where_its_text_does():
    """The first half of a surrogate is held as one unfinished character, and shown as two broken ones."""
    tokenizer, detokenizer = made(tokenizer_kinds.byte_level)
    of = {detokenizer.token_bytes(token): token for token in range(len(tokenizer))}
    stream = detokenizer.stream()
    places = [place for piece in (b"\xed", b"\xa0", b" t") for place in stream.place(of[piece])]
    assert detokenizer.text([of[piece] for piece in (b"\xed", b"\xa0", b" t")]) == "\ufffd\ufffd t"
    assert places[-1] == 2


@pytest.mark.parametrize("kind", (tokenizer_kinds.ctc, tokenizer_kinds.python_bytes), ids=lambda kind: kind.__name__)
def test_other_decoders_go_through_a_window(kind):
    tokenizer, detokenizer = made(kind)
    assert isinstance(detokenizer.stream(), WindowStream)
    ids = tokenizer.encode("a b c \u00e9 abc" * 20, add_special_tokens=False)
    for cut in (0, 1, 40, len(ids)):
        begun, rest = detokenizer.begin(ids[:cut])
        text = "".join(rest.add([token]) for token in ids[cut:]) + rest.flush()
        assert begun + text == tokenizer.decode(ids, skip_special_tokens=True)
    names = detokenizer.names_of(range(len(tokenizer) + 3))
    assert len(set(names.values())) == len(names) == len(tokenizer) + 3
    assert detokenizer.text([*ids, 1, 0] * 500) == tokenizer.decode([*ids, 1, 0] * 500, skip_special_tokens=True)


def test_a_long_prompt_is_read_from_its_end():
    """What is looked at does not grow with the prompt, and runs of bytes and blanks are still right."""
    tokenizer, detokenizer = made(tokenizer_kinds.llama)
    the = tokenizer.convert_tokens_to_ids("\u2581the")
    rocket = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\U0001f680".encode()]
    blank = tokenizer.convert_tokens_to_ids("\u2581")
    long = [the] * 20_000
    assert detokenizer.text([the], context=long) == " the"
    assert detokenizer.text([*rocket[2:], the], context=[*long, *rocket[:2]]) == "\U0001f680 the"
    assert detokenizer.text([the], context=[blank] * 20_000 + [1]) == " the"
    assert detokenizer.text([the], context=[1] * 20_000) == "the"
    assert detokenizer.text([the], context=[1] * 20_000, skip_special_tokens=False) == " the"


def test_a_script_of_byte_tokens_does_not_wait_for_its_end():
    tokenizer, detokenizer = made(tokenizer_kinds.llama)
    text = "\u1019\u103c\u1014\u103a" * 200
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    stream = detokenizer.stream()
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert sum(map(bool, pieces)) > len(text) - MAX_HELD_RUN
