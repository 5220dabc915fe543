"""How the images of a checkpoint are prepared, whichever family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.images import QWEN, read_preprocessor
from kvarena.engine.vision.patches import patching
from kvarena.engine.vision.processing import Processing
from kvarena.engine.vision.tiles import tiling


def processing_of(directory: Path) -> Processing:
    """By the files of a directory. Raises ModelError."""
    return make_processing(read_config(directory), read_preprocessor(directory))


def make_processing(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Processing:
    """By the contents of files.

    Args:
        config: config.json.
        preprocessor: preprocessor_config.json, or what stands for it; may be empty.

    Raises:
        ModelError: a size is missing or does not fit another one.
    """
    make = patching if config.get("model_type") in QWEN else tiling
    return make(config, preprocessor)
