"""Strategies: those of conf/allocator and conf/scheduler, built as the main job builds them, and what runs one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf

from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, StepScheduler
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError
from kvarena.engine.model_runner import ModelRunner
from kvarena.experiments.settings import conf_files
from kvarena.experiments.settings.defaults import register
from kvarena.experiments.settings.targets import Part, full_name, instantiate
from kvarena.schedulers.base import Scheduler

CONF = conf_files.CONF


@dataclass(frozen=True)
class Strategy:
    """An allocator over an empty pool, and the scheduler on top of it."""

    allocator: KVAllocator
    scheduler: StepScheduler

    @classmethod
    def of(
        cls, allocator: Part, scheduler: Part, *, num_blocks: int, max_model_len: int, kv_bytes_per_token: int,
        **options: Any,
    ) -> Strategy:  # fmt: skip
        """What two sections of a config name.

        Args:
            allocator, scheduler: the sections.
            num_blocks: usable blocks of the pool.
            max_model_len: longest prompt + output, in tokens.
            kv_bytes_per_token: of the model.
            options: of the allocator, in place of the section's.

        Raises:
            ConfigError: see `make_part`.
        """
        made = make_part(
            KVAllocator, allocator, num_blocks=num_blocks, max_model_len=max_model_len,
            kv_bytes_per_token=kv_bytes_per_token, **options,
        )  # fmt: skip
        return cls(made, make_part(StepScheduler, scheduler, allocator=made, max_model_len=max_model_len))

    def engine(self, runner: ModelRunner, clock: Clock, *, overlap: bool = False, **watching: Any) -> Engine:
        """An idle engine that runs it.

        Args:
            runner: executes its steps.
            clock: the runner's.
            overlap: plan a step while the one before runs.
            watching: `ledger` and `on_launch`, see `Engine`.
        """
        return Engine(self.scheduler, self.allocator, runner, clock, overlap=overlap, **watching)


def strategy_names(group: str) -> list[str]:
    """Names of the registered strategies of `group` (`allocator` or `scheduler`), sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def strategy_options(group: str, name: str) -> dict[str, Any]:
    """The options of a strategy and their defaults, `_target_` included."""
    return dict(_load(CONF / group / f"{name}.yaml"))


def make_part(kind: type, part: Part, **arguments: Any) -> Any:
    """What `part` names by `_target_`, which must be a `kind`; its own error in place of the one around it.

    Raises:
        ConfigError: options out of range, or a class that is no `kind`.
    """
    try:
        made = instantiate(part, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        if not str(error).startswith("Error locating target"):
            _check_kind(kind, part.need("_target_"), get_object(full_name(part.need("_target_"))))
        raise
    _check_kind(kind, part.need("_target_"), type(made))
    return made


def _check_kind(kind: type, target: str, made_by: Any) -> None:
    if isinstance(made_by, type) and not issubclass(made_by, kind):
        raise ConfigError(
            f"_target_={target} makes no {kind.__name__}; derive the class from {kind.__module__}.{kind.__name__}, "
            "which says what to write"
        )


@cache
def _load(path: Path) -> dict[str, Any]:
    register()  # some defaults ask what the run is for
    options = OmegaConf.to_container(OmegaConf.create(conf_files.options(path)), resolve=True)
    if not isinstance(options, dict) or "_target_" not in options:
        raise ConfigError(f"{path} must be a mapping of options with a _target_")
    return {str(key): value for key, value in options.items()}


def build_allocator(name: str, *, num_blocks: int, max_model_len: int, **options: Any) -> KVAllocator:
    """The allocator of conf/allocator/NAME.yaml with some options replaced or added.

    Raises:
        ConfigError: options out of range.
    """
    config = strategy_options("allocator", name) | options
    return make_part(KVAllocator, Part("allocator", config), num_blocks=num_blocks, max_model_len=max_model_len)


def build_scheduler(name: str, allocator: KVAllocator, *, max_model_len: int, **options: Any) -> Scheduler:
    """The scheduler of conf/scheduler/NAME.yaml with some options replaced.

    Raises:
        ConfigError: options out of range.
    """
    config = strategy_options("scheduler", name) | options
    return make_part(Scheduler, Part("scheduler", config), allocator=allocator, max_model_len=max_model_len)
