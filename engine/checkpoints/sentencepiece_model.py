"""A SentencePiece model as a tokenizer of the `tokenizers` library: the same ids for every text.

Kudo and Richardson, "SentencePiece", EMNLP 2018. The file holds pieces with scores, and how texts are normalised:

    text -> [the file's character map] -> [extra blanks dropped] -> ["▁" in front] -> blanks become "▁" -> pieces
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ModelError

BLANK = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A `tokenizers.Tokenizer`, and the tokenizer_config.json that goes with it."""

    tokenizer: Any
    settings: dict[str, Any]


def convert(file: Path, settings: dict[str, Any]) -> ConvertedTokenizer:
    """Read `file`.

    Args:
        file: a SentencePiece model of kind BPE or unigram.
        settings: tokenizer_config.json, empty where there is none. Without `add_bos_token` there, a text gets the
            model's begin token in front where the model has one, as Llama's and Gemma's do.

    Raises:
        ModelError: no SentencePiece model, or of another kind.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, Tokenizer

    proto = ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ModelError(
            f"{file} is no SentencePiece model (tiktoken's format leaves open how texts are split); copy the model's "
            "tokenizer.json into its directory"
        )
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ModelError(f"{file} is a SentencePiece model of words or characters, which is not read")
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED) and BLANK not in piece.piece
        ]
    )
    names = _names(proto)
    merged = names | {"clean_up_tokenization_spaces": False} | settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    merged.pop("auto_map", None)
    _add_ends(tokenizer, merged, begin=bool(settings.get("add_bos_token", "bos_token" in names)))
    return ConvertedTokenizer(tokenizer, merged)


def _model(proto: Any) -> Any:
    from tokenizers.models import BPE as BPEModel
    from tokenizers.models import Unigram
    from transformers.tokenization_utils_base import generate_merges

    spec = proto.trainer_spec
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.model_type == UNIGRAM:
        return Unigram(scored, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    vocab = {piece: i for i, (piece, _) in enumerate(scored)}
    never = {piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED)}
    return BPEModel(
        vocab, generate_merges(vocab, dict(scored), never), unk_token=spec.unk_piece, fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )  # fmt: skip


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def _decoder(strips: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)


def _names(proto: Any) -> dict[str, str]:
    """The special tokens that the file names, as tokenizer_config.json calls them."""
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def _add_ends(tokenizer: Any, settings: dict[str, Any], *, begin: bool) -> None:
    """The begin and end tokens that a text gets; `settings` says so too."""
    from tokenizers.processors import TemplateProcessing

    settings |= {"add_bos_token": begin, "add_eos_token": bool(settings.get("add_eos_token", False))}
    tokens = {}
    for key, wanted in (("bos_token", begin), ("eos_token", settings["add_eos_token"])):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if wanted and token and tokenizer.token_to_id(token) is not None:
            tokens[key] = token
    if tokens:
        first, last = [[tokens[key]] if key in tokens else [] for key in ("bos_token", "eos_token")]
        tokenizer.post_processor = TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens.values()],
        )
