"""Defaults that depend on other choices: small ones for the embedded demo and for shapes, a directory's own for others.

    engine.max_model_len: ${small_or:2048,null}     2048 for models/demo, null (the model's own) for model.path=DIR
    ${simulated_or:bfloat16,float32}                bfloat16 under runner=simulated, whose profiles are of 16 bit
    ${serve_or:timed,budget}                        timed under mode=serve

Resolvers of OmegaConf: whoever reads the setting reads a plain value. `register` makes them known.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvarena.engine.checkpoints.directory import PACKAGE_ROOT, located

DEMO = PACKAGE_ROOT / "experiments" / "models" / "demo"


def is_small(path: str | None) -> bool:
    """Whether `model.path` names no directory of the user's: the embedded demo, or none at all (a shape)."""
    if path is None:
        return True
    return located(path).resolve() == DEMO


def _small_or(small: Any, other: Any, *, _root_: DictConfig) -> Any:
    return small if is_small(OmegaConf.select(_root_, "model.path")) else other


def _simulated_or(simulated: Any, other: Any, *, _root_: DictConfig) -> Any:
    return simulated if OmegaConf.select(_root_, "runner.kind") == "simulated" else other


def _serve_or(served: Any, other: Any, *, _root_: DictConfig) -> Any:
    return served if OmegaConf.select(_root_, "mode") == "serve" else other


def register() -> None:
    """Make `${small_or:...}`, `${simulated_or:...}` and `${serve_or:...}` known. Idempotent."""
    OmegaConf.register_new_resolver("serve_or", _serve_or, replace=True)
    OmegaConf.register_new_resolver("simulated_or", _simulated_or, replace=True)
    OmegaConf.register_new_resolver("small_or", _small_or, replace=True)
