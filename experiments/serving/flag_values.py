"""Values of flags in vLLM's forms. What cannot be read raises argparse's own error, which names the flag."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

_SIZES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30, "t": 10**12, "T": 2**40}
_SAME_PACKING = {"awq_marlin": "awq", "gptq_marlin": "gptq"}  # the same files, named after vLLM's kernels
QUIET_LEVELS = ("critical", "error", "warning")


def tokens(text: str) -> int:
    """A number of tokens; 4k is 4000, 4K is 4096."""
    return _count(text, "a number of tokens such as 4096 or 4K")


def length(text: str) -> int | None:
    """The same, or `auto` (-1): None, as long as model and memory allow."""
    return None if text in ("auto", "-1") else _count(text, "auto, or a number of tokens such as 4096 or 4K")


def gib_of_bytes(text: str) -> float:
    """Bytes as GiB; 24g are 24 * 10^9."""
    return _count(text, "a number of bytes such as 24G") / 2**30


def _count(text: str, form: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return int(float(match[1]) * _SIZES.get(match[2], 1))


def images(text: str) -> int:
    """Most images of a request, in vLLM's forms; of what is not read, as a video, there may be none."""
    try:
        given = json.loads(text)
    except ValueError:
        given = dict(pair.partition("=")[::2] for pair in text.split(","))
    if isinstance(given, int):
        given = {"image": given}
    try:
        limits = {str(kind): int(_most(limit)) for kind, limit in given.items()}
    except (AttributeError, TypeError, ValueError):
        limits = {}
    others = sorted(kind for kind, most in limits.items() if kind != "image" and most)
    if others:
        raise argparse.ArgumentTypeError(f"{text!r} allows {others[0]}, and images are the only media")
    if limits.get("image", 0 if limits else -1) < 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no limit such as {{"image": 4}} or image=4')
    return limits.get("image", 0)


def _most(limit: Any) -> Any:
    """A kind's limit: a number, or an object with the sizes that memory is measured with beside it."""
    return limit.get("count", 999) if isinstance(limit, dict) else limit


def quantization(text: str) -> str:
    """How weights are packed."""
    return _SAME_PACKING.get(text, text)


def is_same(given: str, value: str) -> bool:
    """Whether two spellings of a value, or of a number, mean the same."""
    try:
        return float(given) == float(value)
    except ValueError:
        return given.lower().replace(" ", "") == value.lower().replace(" ", "")
