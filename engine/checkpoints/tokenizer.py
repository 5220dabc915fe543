"""The tokenizer of a local model directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvarena.engine.checkpoints.directory import check_content, in_files, one_line, read_json, resolve_directory
from kvarena.engine.checkpoints.images import has_class, reads_images, set_chat_template
from kvarena.engine.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
VOCABULARIES = (TOKENIZER_JSON, SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
                "spm.model")  # fmt: skip
# Their tokens are bytes or characters: there is no vocabulary to read.
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def check_tokenizer(directory: Path, trust_remote_code: bool = False) -> None:
    """See that a tokenizer is there, without loading it.

    Raises:
        ModelError: there is none, or a file of it is not what its name says.
    """
    for name in VOCABULARIES:
        if (directory / name).is_file():
            check_content(directory / name)
    if has_tokenizer(directory, trust_remote_code):
        return
    settings = _settings(directory)
    if (directory / "tekken.json").is_file():
        raise ModelError(f"{directory} holds tekken.json, which is not read; copy the model's tokenizer.json into it")
    if "auto_map" in settings:
        raise ModelError(
            f"the tokenizer in {directory} is Python code of its own{in_files(settings)}; copy a tokenizer.json into "
            "it, or if you trust the code, set model.trust_remote_code=true"
        )
    raise ModelError(f"{directory} holds no tokenizer; copy the model's tokenizer.json (or tokenizer.model) into it")


def has_tokenizer(directory: Path, trust_remote_code: bool = False) -> bool:
    """Whether a tokenizer is there, its vocabulary at least. Raises ModelError on a broken tokenizer_config.json."""
    if any((directory / name).is_file() for name in VOCABULARIES):
        return True
    settings = _settings(directory)
    own_code = trust_remote_code and "auto_map" in settings
    return own_code or settings.get("tokenizer_class") in WITHOUT_VOCABULARY


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory. Nothing is fetched from a hub.

    A `tokenizer.model` without tokenizer.json is read as SentencePiece itself reads it, with the settings of
    tokenizer_config.json where there is one.

    Args:
        path: the directory; a relative one as in `load_model`.
        trust_remote_code: run the directory's own Python code.

    Raises:
        ModelError: no directory, no tokenizer in it, or a broken one.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    directory = resolve_directory(path)
    check_tokenizer(directory, trust_remote_code)
    has_json, has_pieces = (directory / TOKENIZER_JSON).is_file(), (directory / SENTENCEPIECE).is_file()
    own_code = trust_remote_code and "auto_map" in _settings(directory)
    verbosity = logging.get_verbosity()
    if _is_original(directory):
        own_code = own_code and not (has_json or has_pieces)  # its files say all that its code does
        logging.set_verbosity_error()  # that the model's type is unknown: the tokenizer's is what counts
    try:
        if has_pieces and not has_json and not own_code:
            tokenizer = _from_sentencepiece(directory)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=own_code)
        set_chat_template(tokenizer, directory)
        return tokenizer
    except ModelError:
        raise
    # Anything: the tokenizer classes raise whatever their parsers do.
    except Exception as error:
        _check_config(directory, trust_remote_code)
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _settings(directory: Path) -> dict[str, object]:
    file = directory / SETTINGS[0]
    return read_json(file) if file.is_file() else {}


def _is_original(directory: Path) -> bool:
    """Whether it is of a model that is converted as it is loaded, whose type transformers does not know."""
    file = directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    return reads_images(config) and not has_class(config)


def _check_config(directory: Path, trust_remote_code: bool) -> None:
    """A tokenizer's class is looked up by the model's config. Raises ModelError where it is that which is broken."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file() or _is_original(directory):
        return
    try:
        AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    # Anything: config classes check their fields in many ways.
    except Exception as error:
        raise ModelError(f"{directory}/config.json is not a valid config: {one_line(error)}") from error


def _from_sentencepiece(directory: Path) -> PreTrainedTokenizerBase:
    """transformers' classes guess what a tokenizer.model leaves open (such as the blank before a text) from the model's
    type; the file itself says it. So it is written as a tokenizer.json, which leaves nothing open.
    """
    from transformers import AutoTokenizer

    from kvarena.engine.checkpoints.sentencepiece_model import convert

    converted = convert(directory / SENTENCEPIECE, _settings(directory))
    with tempfile.TemporaryDirectory(prefix="kvarena-tokenizer-") as folder:
        target = Path(folder)
        for name in SETTINGS:
            if (directory / name).is_file():
                shutil.copy(directory / name, target / name)
        for templates in directory.glob("additional_chat_templates"):
            shutil.copytree(templates, target / templates.name)
        (target / SETTINGS[0]).write_text(json.dumps(converted.settings), encoding="utf-8")
        (target / TOKENIZER_JSON).write_text(converted.tokenizer.to_str(), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = str(directory)
    return tokenizer
