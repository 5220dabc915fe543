"""Streams give the tokenizer's own text, piece by piece, without broken characters."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvarena.engine.server.text.detokenizer import Detokenizer

TEXTS = (
    "Hello, world.",
    "na\u00efve caf\u00e9 \u2615",
    "\u4f60\u597d \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f680!",
    " two  spaces\n\tend ",
)


@pytest.fixture(scope="module")
def demo():
    return AutoTokenizer.from_pretrained("experiments/models/demo")


def _byte_fallback_tokenizer():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for piece in ("\u2581", "a", "b", "\u2581a", "\u2581b"):
        vocab[piece] = len(vocab)
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b")], byte_fallback=True, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _word_tokenizer():
    inner = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 50)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def _streamed(detokenizer, ids):
    stream = detokenizer.stream()
    return [stream.add([token]) for token in ids] + [stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level(demo, text):
    detokenizer = Detokenizer(demo)
    ids = demo.encode(text, add_special_tokens=False)
    pieces = _streamed(detokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ("a b", "\u00e9 a", "\U0001f680b"))
def test_byte_fallback_drops_the_leading_space_once(text):
    tokenizer = _byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(_streamed(detokenizer, ids)) == tokenizer.decode(ids) == text


def test_words_are_joined_by_blanks():
    tokenizer = _word_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert "".join(_streamed(detokenizer, ids)) == tokenizer.decode(ids)


def test_random_tokens_stream_as_they_decode_whole(demo):
    detokenizer = Detokenizer(demo)
    rng = random.Random(1)
    for _ in range(50):
        ids = rng.choices(range(len(demo)), k=40)
        text = detokenizer.text(ids)
        assert "".join(_streamed(detokenizer, ids)) == text == demo.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_character_are_shown_as_such(demo):
    detokenizer = Detokenizer(demo)
    byte_ids = {detokenizer.token_bytes(i): i for i in range(len(demo))}
    stream = detokenizer.stream()
    assert stream.add([byte_ids[b"\xe4"]]) == ""
    assert stream.add([byte_ids[b"A"]]) == "\ufffdA"
    assert stream.add([byte_ids[b"\xe4"]]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_skipped_or_shown(demo):
    """Those without a role of their own too: a chat template's marks."""
    detokenizer = Detokenizer(demo)
    mark = demo.convert_tokens_to_ids("<|im_start|>")
    assert mark not in demo.all_special_ids
    ids = [mark, *demo.encode("a", add_special_tokens=False), demo.eos_token_id]
    assert detokenizer.text(ids) == demo.decode(ids, skip_special_tokens=True) == "a"
    assert detokenizer.text(ids, skip_special_tokens=False) == "<|im_start|>a" + demo.eos_token
