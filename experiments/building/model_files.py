"""The model directory of a config, judged by its files: in milliseconds, before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.errors import ConfigError

LOAD_FORMATS = ("auto", "dummy")


def check_model(cfg: DictConfig, *, tokenizer: bool = False) -> Path | None:
    """See that `model.path` holds what the run will read of it.

    Args:
        cfg: the resolved config.
        tokenizer: whether the model's tokenizer will be read.

    Returns:
        The directory; None where the config names none.

    Raises:
        ConfigError: an unknown `model.load_format`.
        ModelError: one line that says what is wrong and what to do.
    """
    if cfg.model.load_format not in LOAD_FORMATS:
        raise ConfigError(f"model.load_format={cfg.model.load_format} must be one of {', '.join(LOAD_FORMATS)}")
    if cfg.model.path is None:
        return None
    return check_checkpoint(
        cfg.model.path,
        weights=cfg.model.load_format == "auto" and cfg.runner.kind == "torch",
        tokenizer=tokenizer,
        trust_remote_code=bool(cfg.model.trust_remote_code),
    )
