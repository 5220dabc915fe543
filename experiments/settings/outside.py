"""Strategies from outside the checkout: a caller's own classes, and those of installed packages.

Both become choices of the config groups `allocator`, `scheduler` and `router`, beside the files of conf:

    kvarena.run(allocator=Mine)                          the class itself, in this process alone
    [project.entry-points."kvarena.allocators"]          allocator=mine, on the command line too
    mine = "my_package.strategies:MineAllocator"

A third way needs nothing of this module: a folder or package with YAML files of its own, on `hydra.searchpath`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import CodeType
from typing import Any

from hydra.core.config_store import ConfigStore

from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.conf_files import CONF, options
from kvarena.experiments.settings.targets import CALLERS

GROUPS = {"allocator": "kvarena.allocators", "scheduler": "kvarena.schedulers", "router": "kvarena.routers"}
# What the builder passes, which is no option; and the file whose values stand in for options without a default.
GIVEN = {
    "allocator": ("num_blocks", "max_model_len", "kv_bytes_per_token"),
    "scheduler": ("allocator", "max_model_len"),
    "router": (),
}
SHARED = {
    "allocator": ("block_size",),
    "scheduler": ("max_num_seqs", "max_num_batched_tokens"),
    "router": ("num_replicas",),
}
LIKE = {"allocator": "paged", "scheduler": "continuous", "router": "round_robin"}
MISSING = "???"  # OmegaConf's word for a value that must be given


def offer(group: str, strategy: Callable[..., Any]) -> str:
    """Make a caller's class a choice of `group`, and return the choice's name, which is the class's own.

    Args:
        group: `allocator`, `scheduler` or `router`.
        strategy: a class, or a function that makes one's instance; called as the builder calls a registered class.

    Raises:
        ConfigError: it cannot be called, has no name, or one that a file of conf has.
    """
    name = str(getattr(strategy, "__name__", "") or getattr(getattr(strategy, "func", None), "__name__", ""))
    if not callable(strategy) or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ConfigError(
            f"{group}={strategy!r} must be the name of a registered {group}, a class, or a function with a name "
            "(def) that makes one"
        )
    if (CONF / group / f"{name}.yaml").exists():
        raise ConfigError(f"{group}={name}: a registered {group} is called so; give your class another name")
    target = f"{getattr(strategy, '__module__', None) or __name__}.{getattr(strategy, '__qualname__', name)}"
    CALLERS[target] = strategy
    _store(group, name, target, strategy)
    return name


def offer_installed(overrides: Sequence[str]) -> None:
    """Make the installed packages' strategies that `overrides` name choices of their groups.

    Args:
        overrides: as on run.py's command line.

    Raises:
        ConfigError: one of them cannot be imported, or is called like a file of conf.
    """
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group not in GROUPS:
            continue
        unknown = [name for name in re.findall(r"\w[\w.-]*", value) if not (CONF / group / f"{name}.yaml").exists()]
        for name in unknown:
            if (point := installed(group).get(name)) is not None:
                _store(group, name, point.value.replace(":", "."), _load(group, point))


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of `group` by name.

    Raises:
        ConfigError: one is called like a file of conf, or like another one.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUPS[group]):
        package = point.dist.name if point.dist else "an installed package"
        if (CONF / group / f"{point.name}.yaml").exists() or found.get(point.name, point).value != point.value:
            raise ConfigError(
                f"{package} registers a second {group} {point.name!r} (entry points {GROUPS[group]}); rename it there"
            )
        found[point.name] = point
    return found


def _load(group: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever a package does when it is imported
        package = point.dist.name if point.dist else "an installed package"
        raise ConfigError(
            f"{group}={point.name}: {point.value} of {package} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _store(group: str, name: str, target: str, strategy: Callable[..., Any]) -> None:
    ConfigStore.instance().store(
        group=group, name=name, node={"_target_": target} | options_of(group, strategy), provider="kvarena"
    )


def options_of(group: str, strategy: Callable[..., Any]) -> dict[str, Any]:
    """The options of a class and their defaults, read from its constructor and those that it passes options on to.

    Options that all strategies of the group have, and that have no default here, have that of the group; of others
    without one a run asks (`???`). A default that no config can hold stays the constructor's.
    """
    like = options(CONF / group / f"{LIKE[group]}.yaml")
    found: dict[str, Any] = {key: like[key] for key in SHARED[group]}
    for parameter in _parameters(strategy):
        name, default = parameter.name, parameter.default
        if name in GIVEN[group]:
            continue
        if default is parameter.empty:
            found[name] = like.get(name, MISSING)
        elif default is None or isinstance(default, bool | int | float | str | list | dict | tuple):
            found[name] = list(default) if isinstance(default, tuple) else default
    return found


def _parameters(strategy: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    """The parameters by keyword, those of bases first: a constructor with `**options` passes the rest on."""
    makers: list[Callable[..., Any]] = [strategy]
    if inspect.isclass(strategy):
        makers = [base.__dict__["__init__"] for base in strategy.__mro__[:-1] if "__init__" in base.__dict__]
    found: dict[str, inspect.Parameter] = {}
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, parameter)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return reversed(found.values())


def with_bases(targets: Iterable[str]) -> frozenset[str]:
    """`targets`, and beside the caller's own classes among them their bases: code of theirs runs, too."""
    found = set(targets)
    for target in found & CALLERS.keys():
        strategy = _innermost(CALLERS[target])
        if inspect.isclass(strategy):
            found |= {f"{base.__module__}.{base.__qualname__}" for base in strategy.__mro__[1:-1]}
    return frozenset(found)


def sources_of_callers(targets: Iterable[str]) -> dict[str, str]:
    """The texts of the caller's own classes and functions among `targets`, by name."""
    return {target: _text(_innermost(CALLERS[target])) for target in targets if target in CALLERS}


def _innermost(strategy: Any) -> Any:
    """What a partial calls."""
    while hasattr(strategy, "func"):
        strategy = strategy.func
    return strategy


def _text(part: Any) -> str:
    """What a class or function is by its content: the same for one that is defined again with the same words.

    A class goes by its functions and plain attributes: Python finds no source for a notebook's class, but for its
    functions; of those that were typed at a prompt there is the compiled code.
    """
    if inspect.isclass(part):
        own = {name: value for name, value in vars(part).items() if name not in ("__doc__", "__firstlineno__")}
        return f"class({', '.join(base.__qualname__ for base in part.__bases__)})\n" + "\n".join(
            f"{name}: {_text(value)}" for name, value in own.items()
        )
    for inner in ("fget", "func", "__func__", "__wrapped__"):
        if (function := getattr(part, inner, None)) is not None:
            return f"{type(part).__name__} {_text(function)}"
    if not inspect.isfunction(part):
        return repr(part) if isinstance(part, bool | int | float | str | tuple) else type(part).__name__
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return _compiled(part.__code__)


def _compiled(code: CodeType) -> str:
    constants = [
        _compiled(one) if isinstance(one, CodeType)
        else repr(sorted(map(repr, one))) if isinstance(one, frozenset)  # whose order is each process's own
        else repr(one)
        for one in code.co_consts
    ]  # fmt: skip
    return " ".join([code.co_code.hex(), *code.co_names, *code.co_varnames, *constants])
