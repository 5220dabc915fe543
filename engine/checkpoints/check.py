"""All that can be told of a model directory before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from kvarena.engine.checkpoints.directory import read_config, read_json, resolve_directory
from kvarena.engine.checkpoints.kinds import check_kind
from kvarena.engine.checkpoints.packed import check_method, packed_checkpoint
from kvarena.engine.checkpoints.packed_settings import packed_settings
from kvarena.engine.checkpoints.tokenizer import SETTINGS, check_tokenizer
from kvarena.engine.checkpoints.weights import check_weights


def check_checkpoint(
    path: str | Path,
    *,
    weights: bool = True,
    tokenizer: bool = False,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> Path:
    """See that a directory holds a model that can be loaded, as far as its files say.

    Args:
        path: as `load_model` takes it.
        weights: its weights will be read.
        tokenizer: its tokenizer will be read.
        trust_remote_code: its own Python code may run.
        quantization: the method with which its weights must be quantised; None: any, or none.

    Returns:
        The directory, absolute.

    Raises:
        ModelError: one line that says what is wrong and what to do.
    """
    directory = resolve_directory(path)
    config = read_config(directory)
    check_kind(directory, config, weights=weights)
    for name in (*SETTINGS, "generation_config.json"):
        if name.endswith(".json") and (directory / name).is_file():
            read_json(directory / name)
    if tokenizer:
        check_tokenizer(directory, trust_remote_code)
    if weights:
        check_weights(directory, config, packed=packed_settings(directory, config) is not None)
        packed_checkpoint(directory, config)
    if quantization is not None:
        check_method(directory, config, quantization, weights=weights)
    return directory
