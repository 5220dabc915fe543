"""A model directory of a real shape without weights: a config and a word-level tokenizer, for `--load-format dummy`.

kvarena make shape conf/model/qwen3-0.6b-shape.yaml DIR
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvarena.experiments.settings.compose import CONF_DIR
from kvarena.experiments.tools import tool_parser

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_model_dir(shape_file: Path, directory: Path) -> Path:
    """Write the directory; a token's text is `t` and its number.

    Args:
        shape_file: a file of conf/model with a shape.
        directory: made when it is missing.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shape: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(shape_file).shape)  # type: ignore[assignment]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape, indent=1) + "\n")
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"t{i}": i for i in range(3, shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(directory))
    return directory


def main(argv: Sequence[str]) -> int:
    """Make one directory."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("shape", type=Path, help=f"a file with a shape, such as {CONF_DIR.name}/model/*-shape.yaml")
    parser.add_argument("directory", type=Path, help="the model directory to make")
    options = parser.parse_args(argv)
    print(make_model_dir(options.shape, options.directory))
    return 0
