"""Classes that a config names (`_target_`), made.

Our folders were packages of their own once: `allocators.paged.PagedAllocator` in a recorded config or a user's is
`kvarena.allocators.paged.PagedAllocator`, and stays readable. No module of ours may live under two names: its classes
would be two, and an error of the one would not be an error of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from os.path import realpath
from typing import Any

import hydra.utils
from omegaconf import ListConfig, OmegaConf

import kvarena
from kvarena.engine.errors import ConfigError

# Classes and functions of whoever runs this process, by the name that a config gives them (`outside.py`).
CALLERS: dict[str, Callable[..., Any]] = {}
FOLDERS = ("engine", "allocators", "schedulers", "routers", "experiments", "reports")


@dataclass(frozen=True)
class Part:
    """A section that names a class by `_target_`, and the options that the class takes and checks.

    Attributes:
        key: the section's, for errors.
        options: plain values, `_target_` among them.
    """

    key: str
    options: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The options without the class."""
        return {key: value for key, value in self.options.items() if key != "_target_"}

    def need(self, name: str) -> Any:
        """An option that is read by others than the class. Raises ConfigError where there is none."""
        if name not in self.options:
            raise ConfigError(f"{self.key}.{name} is needed: leave ~{self.key}.{name} out, or add +{self.key}.{name}=")
        return self.options[name]


def instantiate(part: Part | None, **arguments: Any) -> Any:
    """Hydra's `instantiate`; names of ours are taken with and without the package's. None of None.

    Raises:
        ConfigError: what the config names imports one of our modules under a second name.
        hydra.errors.InstantiationException: as Hydra does.
    """
    if part is None:
        return None
    named = OmegaConf.create(_named(part.options))
    named._set_parent(OmegaConf.create({}))  # an error names the section by its key
    named._set_key(part.key)
    made = hydra.utils.instantiate(named, **arguments)
    check_names()
    return made


def made_by_caller(caller: str, **options: Any) -> Any:
    """What the class or function that CALLERS has as `caller` makes of its options."""
    return CALLERS[caller](**options)


def full_name(target: str) -> str:
    """`target` with the package's name in front where it names a module of ours without."""
    head, _, rest = target.partition(".")
    module = f"{kvarena.__name__}.{head}.{rest.partition('.')[0]}"
    return f"{kvarena.__name__}.{target}" if head in FOLDERS and rest and find_spec(module) is not None else target


def check_names() -> None:
    """See that no module of ours was imported under a second name.

    Raises:
        ConfigError: with what to write in the import.
    """
    for head in FOLDERS:
        ours, other = sys.modules.get(f"{kvarena.__name__}.{head}"), sys.modules.get(head)
        if ours is not None and other is not None and _place(other) == _place(ours):
            raise ConfigError(
                f"something imports {head} where it is {kvarena.__name__}.{head}: write `from {kvarena.__name__}.{head}"
                "...` in your own modules"
            )


def leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a resolved config by its key, with dots; entries of lists by their number."""
    if isinstance(node, dict | list):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _place(module: Any) -> str | None:
    file = getattr(module, "__file__", None)
    return realpath(file) if file else None


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        renamed = {key: _named(inner) for key, inner in value.items()}
        if isinstance(target := renamed.get("_target_"), str):
            renamed["_target_"] = full_name(target)
            if target in CALLERS:  # Hydra takes names alone, and a notebook's class is nowhere to be found by one
                renamed |= {"_target_": f"{__name__}.made_by_caller", "caller": target}
        return renamed
    if isinstance(value, list | ListConfig):
        return [_named(inner) for inner in value]
    return value
