"""The registered strategies: every file of conf/allocator and conf/scheduler, built as the main job builds them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from engine.contract import KVAllocator
from engine.errors import ConfigError
from schedulers.base import Scheduler

CONF = Path(__file__).resolve().parent.parent / "conf"


def strategy_names(group: str) -> list[str]:
    """Names of the registered strategies of `group` (`allocator` or `scheduler`), sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def strategy_options(group: str, name: str) -> dict[str, Any]:
    """The options of a strategy and their defaults, `_target_` included."""
    return dict(_load(CONF / group / f"{name}.yaml"))


def _instantiate(config: dict[str, Any], **arguments: Any) -> Any:
    """Hydra's `instantiate`, with the class's own error in place of the one that Hydra wraps it in."""
    try:
        return instantiate(config, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


@cache
def _load(path: Path) -> dict[str, Any]:
    options = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(options, dict):
        raise ConfigError(f"{path} must be a mapping of options with a _target_")
    return {str(key): value for key, value in options.items()}


def build_allocator(name: str, *, num_blocks: int, max_model_len: int, **options: Any) -> KVAllocator:
    """The allocator of conf/allocator/NAME.yaml with some options replaced or added.

    Raises:
        ConfigError: options out of range.
    """
    config = strategy_options("allocator", name) | options
    return _instantiate(config, num_blocks=num_blocks, max_model_len=max_model_len)


def build_scheduler(name: str, allocator: KVAllocator, *, max_model_len: int, **options: Any) -> Scheduler:
    """The scheduler of conf/scheduler/NAME.yaml with some options replaced.

    Raises:
        ConfigError: options out of range.
    """
    config = strategy_options("scheduler", name) | options
    return _instantiate(config, allocator=allocator, max_model_len=max_model_len)
