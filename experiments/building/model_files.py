"""The model directory of a config, judged by its files: in milliseconds, before torch is loaded.

A name on a hub is looked up here, at the door of every command, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import is_model_name
from kvarena.engine.checkpoints.hubs import fetch_model
from kvarena.experiments.settings.config import RunConfig


def check_model(config: RunConfig, *, tokenizer: bool = False) -> Path | None:
    """See that `model.path` holds what the run will read of it. A model that a hub has is downloaded first.

    Args:
        config: of the run.
        tokenizer: whether the model's tokenizer will be read.

    Returns:
        The directory; None where the config names none.

    Raises:
        ModelError: one line that says what is wrong and what to do.
    """
    model = config.model
    if model.path is None:
        return None
    weights = model.load_format == "auto" and config.runner.kind == "torch"
    if is_model_name(model.path):
        fetch_model(model.path, weights=weights)
    return check_checkpoint(
        model.path,
        weights=weights,
        tokenizer=tokenizer,
        trust_remote_code=model.trust_remote_code,
        quantization=model.quantization if config.runner.kind == "torch" else None,
    )
