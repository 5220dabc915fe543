"""Checks of a model directory that need no weights: each fault is one line that says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.errors import ModelError

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve_directory(path: str | Path) -> Path:
    """The model directory that `path` names: relative to the working directory, else to the project's root.

    Raises:
        ModelError: there is none. A name is never looked up on a model hub.
    """
    given = Path(path).expanduser()
    for candidate in (given, PROJECT_ROOT / given):
        if candidate.is_dir():
            return candidate.resolve()
    what = "is a file" if given.is_file() else "does not exist"
    raise ModelError(f"model.path={path} {what}; give a local directory that holds config.json and the weights")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: unreadable, no JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return content


def check_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: missing, broken, or without a model type.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ModelError(f"{directory} has no config.json; model.path must name a transformers model directory")
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type; it is not the config of a transformers model")
    return config


def check_weights(directory: Path) -> None:
    """See that the weight files are there and whole.

    Raises:
        ModelError: no weights, a shard of the index is missing, or a file is cut off.
    """
    for file in _safetensors_files(directory):
        if not file.is_file():
            raise ModelError(f"{directory} lacks {file.name}, which {SAFETENSORS_INDEX} names; copy it again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or broken ({one_line(error)}); copy it again") from error


def _safetensors_files(directory: Path) -> list[Path]:
    if (directory / SAFETENSORS).is_file():
        return [directory / SAFETENSORS]
    index = directory / SAFETENSORS_INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map; copy it again")
        return [directory / name for name in sorted(set(weight_map.values()))]
    if any((directory / name).is_file() for name in PICKLES):
        return []
    raise ModelError(
        f"{directory} holds no weights: {SAFETENSORS} or {SAFETENSORS_INDEX} with its shards is missing "
        "(model.load_format=dummy runs the shape without weights)"
    )


def special_token_ids(directory: Path) -> frozenset[int]:
    """Ids that the directory's tokenizer files mark as special; empty without a tokenizer."""
    found: set[int] = set()
    file = directory / "tokenizer.json"
    if file.is_file():
        found |= {token["id"] for token in read_json(file).get("added_tokens") or [] if token.get("special")}
    file = directory / "tokenizer_config.json"
    if file.is_file():
        decoder = read_json(file).get("added_tokens_decoder") or {}
        found |= {int(key) for key, token in decoder.items() if token.get("special")}
    return frozenset(found)


def end_token(directory: Path) -> str | None:
    """The end-of-sequence token that the directory's tokenizer files name; empty when they say that there is none.

    None when they leave it to the tokenizer's class, or there is no tokenizer.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = directory / name
        if file.is_file() and "eos_token" in (values := read_json(file)):
            token = values["eos_token"]
            return str(token.get("content", "") if isinstance(token, dict) else token or "")
    return None


def token_id(directory: Path, token: str) -> int | None:
    """The id that the directory's tokenizer files give `token`; None when they do not hold it."""
    file = directory / "tokenizer_config.json"
    if file.is_file():
        for key, added in (read_json(file).get("added_tokens_decoder") or {}).items():
            if added.get("content") == token:
                return int(key)
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    values = read_json(file)
    for added in values.get("added_tokens") or []:
        if added.get("content") == token:
            return int(added["id"])
    vocab = (values.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return vocab.get(token)
    return next((i for i, entry in enumerate(vocab) if entry[0] == token), None)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
