"""The model directory of a config, judged by its files: in milliseconds, before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.experiments.settings.config import RunConfig


def check_model(config: RunConfig, *, tokenizer: bool = False) -> Path | None:
    """See that `model.path` holds what the run will read of it.

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
    return check_checkpoint(
        model.path,
        weights=model.load_format == "auto" and config.runner.kind == "torch",
        tokenizer=tokenizer,
        trust_remote_code=model.trust_remote_code,
        quantization=model.quantization if config.runner.kind == "torch" else None,
    )
