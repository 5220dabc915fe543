"""A model directory's path and its small files: each fault is one line that says what is wrong and what to do."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.hubs import cached_model
from kvarena.engine.errors import ModelError

# What holds engine, experiments, ...: a checkout, or an installation.
PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What people have in place of a file: its address in Git LFS, or the page that a browser shows of it.
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype html", b"<html")


def located(path: str | Path) -> Path:
    """What `path` names: a file or folder of the working directory, else one that comes with the project.

    An empty folder hides nothing: a checkout that moved leaves such ones behind.
    """
    given = Path(path)
    with suppress(RuntimeError):  # ~NAME of nobody here: a path like any other
        given = given.expanduser()
    shipped = PACKAGE_ROOT / "experiments" / given
    is_there = any(given.iterdir()) if given.is_dir() else given.exists()
    return shipped if shipped.exists() and not is_there else given


def is_model_name(path: str | Path) -> bool:
    """Whether `path` can only be a model's name on a hub: OWNER/NAME, and here is no folder OWNER."""
    text = str(path)
    if _MODEL_NAME.fullmatch(text) is None or text.endswith(".gguf"):
        return False
    return not any((place / text).parent.exists() for place in (Path(), PACKAGE_ROOT / "experiments"))


def resolve_directory(path: str | Path) -> Path:
    """The model directory that `path` names: relative to the working directory, else one that comes with the project.

    A model's name stands for the folder into which its hub's library has downloaded it; nothing is downloaded here.

    Raises:
        ModelError: there is none.
    """
    if is_model_name(path):
        return cached_model(str(path)).resolve()
    given = located(path)
    if given.is_dir():
        return given.resolve()
    if given.suffix == ".gguf" and given.is_file():
        raise ModelError(
            f"model.path={path} is a GGUF file, which is not read; give the directory of the model's own checkpoint, "
            "with config.json and model.safetensors"
        )
    what = "is a file" if given.is_file() else "does not exist"
    raise ModelError(f"model.path={path} {what}; give a local directory that holds config.json and the weights")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: unreadable, no JSON, or not an object.
    """
    check_content(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return content


def check_content(file: Path) -> None:
    """See that `file` is what its name says, and not something that stands in for it.

    Raises:
        ModelError: a Git LFS pointer, a web page, a dangling link, or unreadable.
    """
    if file.is_symlink() and not file.exists():
        raise ModelError(f"{file} is a link to {file.readlink()}, which is not there; copy the file itself")
    try:
        with file.open("rb") as stream:
            begin = stream.read(64).lstrip().lower()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    if begin.startswith(_LFS):
        raise ModelError(
            f"{file} is a Git LFS pointer, not the file itself; run git lfs pull in {file.parent}, or copy the file"
        )
    if begin.startswith(_PAGES):
        raise ModelError(f"{file} is a web page, not the file itself; download the file again")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: missing, broken, or without a model type.
    """
    file = directory / "config.json"
    if not file.is_symlink() and not file.is_file():
        raise ModelError(f"{directory} has no config.json; {_instead_of_config(directory)}")
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type; it is not the config of a transformers model")
    return config


def in_files(config: dict[str, Any]) -> str:
    """The files of code that a config's `auto_map` names, in brackets; empty where it names none."""
    entries = config.get("auto_map")
    named = entries.values() if isinstance(entries, dict) else [entries]
    listed = [entry for one in named for entry in (one if isinstance(one, list) else [one])]
    files = {f"{entry.rpartition('--')[2].rpartition('.')[0]}.py" for entry in listed if isinstance(entry, str)}
    return f" ({', '.join(sorted(files - {'.py'}))})" if files - {".py"} else ""


def _instead_of_config(directory: Path) -> str:
    """What a directory without config.json is, and what to give in its place."""
    if (directory / "adapter_config.json").is_file():
        base = _text(directory / "adapter_config.json", "base_model_name_or_path")
        of = f" of {base}" if base else ""
        return f"it holds an adapter{of} (peft) and no model; merge it into its base model and give that directory"
    if (directory / "model_index.json").is_file():
        return "it holds a diffusers pipeline, which is no language model"
    snapshots = sorted((directory / "snapshots").glob("*/config.json"))
    if snapshots:
        return f"it is a folder of the Hugging Face cache; give {snapshots[-1].parent}"
    inside = sorted(file.parent for file in directory.glob("*/config.json"))
    if len(inside) == 1:
        return f"give {inside[0]}, which has one"
    if any(directory.glob("*.gguf")):
        return "it holds GGUF weights, which are not read; give the model's own checkpoint, with model.safetensors"
    if (directory / "params.json").is_file():
        return "it holds its maker's own format (params.json); give the checkpoint for transformers, with config.json"
    return "model.path must name a transformers model directory"


def _text(file: Path, key: str) -> str | None:
    """A string of a JSON file that need not be whole."""
    try:
        value = read_json(file).get(key)
    except ModelError:
        return None
    return value if isinstance(value, str) and value else None


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
    """The first line of an exception's message with what it announces, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):  # its message is the key alone
        return f"there is no {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
