"""What a tokenizer's decoder does to each token, read from the decoder's own description.

A `tokenizers` decoder is a chain of stages. Up to `Fuse` (or the end) each works on one token and knows at most whether
it is the first; behind it they see the text. So a text is the join of pieces, made once at start-up:

    token --> stages of single tokens --> piece --> join --> stages of the text
                `ByteFallback`: a run of byte tokens is one piece when it is UTF-8, else U+FFFD for each byte

A chain of another shape has no such form (`read_form` gives None), and its text is found by decoding a window.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ANCHOR = "x"
_PER_TOKEN = ("Replace", "Metaspace", "WordPiece", "Strip")
TokenMap = Callable[[str, bool], str]


@dataclass(frozen=True)
class Strip:
    """Blanks that a text loses: at most `start` times `content` at its start, `stop` times at its end."""

    content: str
    start: int
    stop: int


@dataclass(frozen=True)
class Form:
    """How tokens become text.

    Attributes:
        pieces: by token id: what a token adds when it is not the first. Bytes where the text is the UTF-8 of all of
            them, str where it is their join; None for an id without a token.
        first: what a token (by its vocabulary string) is as the first of a text; None: the same as elsewhere.
        bytes_of: byte tokens, whose runs make one piece.
        of_run: from a run's text to its piece; the flag says that the run begins the text.
        strips: what the text loses at its ends.
        suffixed: tokens behind which a blank stands unless the text ends there.
    """

    pieces: list[bytes | None] | list[str | None]
    is_bytes: bool
    first: Callable[[str], str] | None = None
    bytes_of: dict[int, int] | None = None
    of_run: TokenMap | None = None
    strips: tuple[Strip, ...] = ()
    suffixed: frozenset[int] = frozenset()


def read_form(decoder: Any, tokens: list[str | None]) -> Form | None:
    """The form of a decoder.

    Args:
        decoder: a `tokenizers` decoder, or None (tokens are then joined by blanks).
        tokens: the vocabulary by id; None for ids without a token.
    """
    if decoder is None:
        return Form([None if token is None else " " + token for token in tokens], False, first=str)
    try:
        stages = _flat(json.loads(decoder.__getstate__()))
    except Exception:  # one written in Python describes itself in no form; the library raises a bare Exception
        return None
    kinds = [stage["type"] for stage in stages]
    if kinds == ["BPEDecoder"]:
        return _suffixed(stages[0]["suffix"], tokens)
    if kinds[:1] == ["ByteLevel"]:
        strips = _strips(stages[1:])
        return None if strips is None else Form(_byte_level(tokens), True, strips=strips)
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    strips = _strips(stages[fuse:])
    single = stages[:fuse]
    if strips is None or any(stage["type"] not in (*_PER_TOKEN, "ByteFallback") for stage in single):
        return None
    return _of_single(single, tokens, strips)


def _suffixed(suffix: str, tokens: list[str | None]) -> Form | None:
    """The form of words that end in `suffix`: a blank, but not where the text ends."""
    if any(suffix in token[: -len(suffix)] for token in tokens if token):
        return None
    ends = frozenset(i for i, token in enumerate(tokens) if token and token.endswith(suffix))
    return Form([None if token is None else token.removesuffix(suffix) for token in tokens], False, suffixed=ends)


def _of_single(single: list[dict[str, Any]], tokens: list[str | None], strips: tuple[Strip, ...]) -> Form | None:
    """The form of stages that each see one token, with at most one `ByteFallback` among them."""
    at = [i for i, stage in enumerate(single) if stage["type"] == "ByteFallback"]
    if len(at) > 1:
        return None
    bytes_of = None
    if at:
        matched = ((i, token) for i, token in enumerate(tokens) if token and _BYTE_TOKEN.fullmatch(token))
        bytes_of = {i: int(token[3:5], 16) for i, token in matched}
    ordinary = [stage for stage in single if stage["type"] != "ByteFallback"]
    of_token = _map(ordinary)
    pieces = [None if token is None else of_token(token, False) for token in tokens]
    depends = any(stage["type"] in ("WordPiece", "Metaspace") for stage in ordinary)
    after = single[at[0] + 1 :] if at else []
    return Form(
        pieces,
        False,
        first=(lambda token: of_token(token, True)) if depends else None,
        bytes_of=bytes_of,
        of_run=_map(after) if after else None,
        strips=strips,
    )


def _flat(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a chain, nested ones opened."""
    if stage["type"] != "Sequence":
        return [stage]
    return [one for inner in stage["decoders"] for one in _flat(inner)]


def _strips(stages: list[dict[str, Any]]) -> tuple[Strip, ...] | None:
    """Stages that see the whole text; None when one is not known."""
    made = []
    for stage in stages:
        if stage["type"] == "Strip":
            made.append(Strip(stage["content"], stage["start"], stage["stop"]))
        elif stage["type"] != "Fuse":
            return None
    return tuple(made)


def _map(stages: list[dict[str, Any]]) -> TokenMap:
    """What `stages` make of a token; the flag says that it is the first."""
    if all(stage["type"] == "Metaspace" or "String" in stage.get("pattern", {}) for stage in stages):
        return lambda token, is_first: _replaced(stages, token, is_first)
    chain = decoders.Sequence([_decoder(stage) for stage in stages])
    anchor = len(chain.decode([_ANCHOR]))
    return lambda token, is_first: chain.decode([token]) if is_first else chain.decode([_ANCHOR, token])[anchor:]


def _replaced(stages: list[dict[str, Any]], token: str, is_first: bool) -> str:
    """The same for the stages of most vocabularies, whose quarter of a million tokens must not take seconds."""
    for stage in stages:
        if stage["type"] == "Replace":
            token = token.replace(stage["pattern"]["String"], stage["content"])
        else:
            dropped = is_first and stage["prepend_scheme"] != "never"
            token = token.replace(stage["replacement"], "" if dropped else " ")
    return token


def _decoder(stage: dict[str, Any]) -> Any:
    kind = stage["type"]
    if kind == "Replace":
        pattern = stage["pattern"]
        return decoders.Replace(pattern["String"] if "String" in pattern else Regex(pattern["Regex"]), stage["content"])
    if kind == "Metaspace":
        return decoders.Metaspace(stage["replacement"], stage["prepend_scheme"], stage["split"])
    if kind == "WordPiece":
        return decoders.WordPiece(stage["prefix"], stage["cleanup"])
    return decoders.Strip(stage["content"], stage["start"], stage["stop"])


def _byte_level(tokens: list[str | None]) -> list[bytes | None]:
    """Bytes of tokens in GPT-2's alphabet; a token with another character stands for its own UTF-8."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in own}
    shifted = (byte for byte in range(256) if byte not in set(own))
    alphabet |= {chr(0x100 + i): byte for i, byte in enumerate(shifted)}
    pieces: list[bytes | None] = []
    for token in tokens:
        if token is None:
            pieces.append(None)
            continue
        try:
            pieces.append(bytes([alphabet[char] for char in token]))
        except KeyError:
            pieces.append(token.encode())
    return pieces
