"""Finds the eviction policy that a name means: a file of `eviction/`, an installed package's, or any class by its path.

lru                                          allocators/eviction/lru.py, the one policy in it
mine                                         [project.entry-points."kvarena.eviction"] mine = "my_package:Mine"
my_package.policies.MinePolicy               the class itself
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import Parameter, signature
from pkgutil import iter_modules
from typing import Any

from kvarena.allocators.eviction_order import EvictionPolicy
from kvarena.engine.errors import ConfigError

HOME = "kvarena.allocators.eviction"
ENTRY_POINTS = "kvarena.eviction"
SETTING = "allocator.eviction"


def policy_names() -> list[str]:
    """The policies of this checkout and of installed packages, sorted."""
    own = (module.name for module in iter_modules(import_module(HOME).__path__))
    return sorted({*own, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def make_policy(
    name: str, *, num_blocks: int, block_size: int, ghosts: float, options: Mapping[str, Any]
) -> EvictionPolicy:
    """The policy called `name`, for a pool of these sizes.

    Args:
        name: see the module's docstring.
        num_blocks, block_size, ghosts: see EvictionPolicy.
        options: the policy's own.

    Raises:
        ConfigError: no such policy, one that cannot be made, or an option that it does not have.
    """
    made = _find(name)
    known = {
        key
        for base in made.__mro__
        if "__init__" in vars(base)
        for key, parameter in signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY
    } - {"num_blocks", "block_size", "ghosts"}
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            f"allocator.eviction_options: {SETTING}={name} has no option {', '.join(unknown)}; "
            f"{'it has ' + ', '.join(sorted(known)) if known else 'it has none'}"
        )
    if missing := sorted(getattr(made, "__abstractmethods__", ())):
        raise ConfigError(
            f"{SETTING}={name}: {made.__name__} lacks {', '.join(missing)}; write what EvictionPolicy says"
        )
    policy = made(num_blocks=num_blocks, block_size=block_size, ghosts=ghosts, **options)
    if not hasattr(policy, "max_ghosts"):
        raise ConfigError(f"{SETTING}={name}: {made.__name__} must call super().__init__(**sizes) first")
    return policy


def _find(name: str) -> type[EvictionPolicy]:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{SETTING}={name!r} must be a policy's name: {', '.join(policy_names())}")
    try:
        if "." not in name and find_spec(f"{HOME}.{name}") is not None:
            return _only_policy(name, f"{HOME}.{name}")
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == name:
                return _checked(name, point.load())
        if "." in name:
            module, _, attribute = name.replace(":", ".").rpartition(".")
            return _checked(name, getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{SETTING}={name} cannot be loaded: {error}") from error
    raise ConfigError(
        f"{SETTING}={name} is no policy; take one of {', '.join(policy_names())}, or a class as package.module.Class"
    )


def _only_policy(name: str, module: str) -> type[EvictionPolicy]:
    found = [
        one
        for one in vars(import_module(module)).values()
        if isinstance(one, type) and issubclass(one, EvictionPolicy) and one.__module__ == module
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{SETTING}={name}: {module} must have one class on top of EvictionPolicy, and has {len(found)}"
        )
    return found[0]


def _checked(name: str, made: Any) -> type[EvictionPolicy]:
    if not (isinstance(made, type) and issubclass(made, EvictionPolicy)):
        raise ConfigError(
            f"{SETTING}={name} is no policy; derive the class from {EvictionPolicy.__module__}.EvictionPolicy"
        )
    return made
