"""The tokenizer of a local model directory."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.checkpoints.directory import one_line, resolve_directory
from engine.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory. Nothing is fetched from a hub.

    Args:
        path: the directory; a relative one as in `load_model`.
        trust_remote_code: run the directory's own Python code.

    Raises:
        ModelError: no directory, no tokenizer in it, or a broken one.
    """
    directory = resolve_directory(path)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{directory} holds no tokenizer; copy the model's tokenizer.json (or tokenizer.model) into it"
        )
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    # Anything: the tokenizer classes raise whatever their parsers do.
    except Exception as error:
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {one_line(error)}") from error
