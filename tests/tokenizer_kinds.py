"""Small tokenizers of every kind that checkpoints bring, each with its own way from tokens to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
BLANK = "\u2581"
# Also blanks in a row, a text that two tokens have, punctuation, and characters of two, three and four bytes.
PIECES = [BLANK, BLANK * 2, "a", "b", "t", "h", "e", "th", "the", BLANK + "t", BLANK + "th", BLANK + "the", BLANK + "a"]
PIECES += [
    BLANK + "b",
    ".",
    ",",
    BLANK + ".",
    "'",
    BLANK + "'",
    "n",
    BLANK + "n",
    "'s",
    "d",
    "\u00e9",
    "\u4f60",
    "\U0001f680",
]
DEMO = Path(__file__).resolve().parent.parent / "experiments" / "models" / "demo"


def _vocab(*parts: list[str]) -> dict[str, int]:
    tokens = [*SPECIAL, *(token for part in parts for token in part)]
    return {token: i for i, token in enumerate(tokens)}


def _fast(inner: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )
    tokenizer.add_tokens(["<call>", "caf\u00e9 "], special_tokens=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    return tokenizer


def _fallback_bpe(strip: bool) -> PreTrainedTokenizerFast:
    words = [(BLANK, "t"), (BLANK + "t", "h"), (BLANK + "th", "e"), (BLANK, "a"), (BLANK, "b")]
    merges = [*words, ("t", "h"), ("th", "e")]
    vocab = _vocab(BYTES, PIECES)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace: list[Any] = [normalizers.Replace(" ", BLANK)]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), *replace] if strip else replace)
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if strip else []
    inner.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(inner)


def llama() -> PreTrainedTokenizerFast:
    """BPE with a dummy prefix and byte fallback: Llama 2, Mistral, TinyLlama."""
    return _fallback_bpe(strip=True)


def gemma() -> PreTrainedTokenizerFast:
    """The same without a dummy prefix."""
    return _fallback_bpe(strip=False)


def _unigram(decoder: Any, byte_fallback: bool, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokens = _vocab(BYTES if byte_fallback else [], PIECES)
    inner = Tokenizer(models.Unigram([(token, -float(i)) for token, i in tokens.items()], 0, byte_fallback))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="always")
    inner.decoder = decoder
    return _fast(inner, **kwargs)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model: T5, XGLM, XLNet."""
    return _unigram(decoders.Metaspace(BLANK, prepend_scheme="always"), byte_fallback=False)


def unigram_cleaned() -> PreTrainedTokenizerFast:
    """The same, with blanks before punctuation taken out."""
    return _unigram(decoders.Metaspace(BLANK, prepend_scheme="always"), False, clean_up_tokenization_spaces=True)


def unigram_bytes() -> PreTrainedTokenizerFast:
    """The same with byte fallback, which here comes before the blanks."""
    chain = [decoders.ByteFallback(), decoders.Metaspace(BLANK, prepend_scheme="always")]
    return _unigram(decoders.Sequence(chain), byte_fallback=True)


def wordpiece(**kwargs: Any) -> PreTrainedTokenizerFast:
    """BERT's: pieces of words are marked, words are joined by blanks."""
    words = ["the", "a", "b", "##the", "##a", "##b", "##", ".", ",", "'", "n't", "do", "not", "##.", "\u00e9"]
    inner = Tokenizer(models.WordPiece(_vocab(words), unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece("##", cleanup=True)
    return _fast(inner, **kwargs)


def wordpiece_cleaned() -> PreTrainedTokenizerFast:
    """The same, with blanks before punctuation taken out of the text too."""
    return wordpiece(clean_up_tokenization_spaces=True)


def words() -> PreTrainedTokenizerFast:
    """Whole words, without a decoder: they are joined by blanks."""
    inner = Tokenizer(models.WordLevel(_vocab([f"w{i}" for i in range(40)]), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(inner)


def suffix_bpe() -> PreTrainedTokenizerFast:
    """The first GPT's: the end of a word is marked."""
    pieces = ["a", "b", "the", "a</w>", "b</w>", "the</w>", ".</w>", "</w>", "\u00e9</w>"]
    inner = Tokenizer(models.BPE(vocab=_vocab(pieces), merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.BPEDecoder("</w>")
    return _fast(inner)


def byte_level() -> Any:
    """GPT-2's alphabet, with a trained vocabulary: GPT-2, Llama 3, Qwen."""
    return AutoTokenizer.from_pretrained(DEMO)


def byte_level_bare() -> PreTrainedTokenizerFast:
    """The same with nothing but the bytes, so that most texts are broken characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab=_vocab(alphabet), merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _fast(inner)


EXACT: tuple[Callable[[], Any], ...] = (
    llama, gemma, unigram, unigram_cleaned, unigram_bytes, wordpiece, wordpiece_cleaned, words, suffix_bpe,
    byte_level, byte_level_bare,
)  # fmt: skip


def ctc() -> PreTrainedTokenizerFast:
    """A decoder that drops repeated tokens: none of the known forms."""
    inner = Tokenizer(models.WordLevel(_vocab(["a", "b", "c", "|", "<pad>"]), unk_token="<unk>"))
    inner.decoder = decoders.CTC("<pad>", "|", cleanup=False)
    return _fast(inner)


def python_bytes() -> ByT5Tokenizer:
    """A tokenizer that is Python code, which drops bytes that are no character."""
    return ByT5Tokenizer()
