"""Checks of options, shared by workloads and arrivals: each names the option, its value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from kvarena.engine.errors import ConfigError

# Longer than any context in use; above it a length is a typing error, and its prompt would not fit in memory.
MAX_LENGTH = 10_000_000
MAX_REQUESTS = 100_000_000


def is_int(value: object) -> bool:
    """True for an integer that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(key: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """`value`, an integer in [at_least, at_most]. Raises ConfigError."""
    if not is_int(value) or value < at_least or (at_most is not None and value > at_most):
        must = f"an integer of at least {at_least}" if at_most is None else f"an integer in [{at_least}, {at_most}]"
        raise ConfigError(f"{key}={value} must be {must}")
    return int(value)


def check_number(key: str, value: Any, at_least: float = 0.0, *, above: bool = False) -> float:
    """`value`, a finite number of at least (`above`: greater than) `at_least`. Raises ConfigError."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < at_least or (above and value == at_least):
        raise ConfigError(f"{key}={value} must be a finite number {'above' if above else 'of at least'} {at_least:g}")
    return float(value)


def check_bool(key: str, value: Any) -> bool:
    """`value`, true or false. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value} must be true or false")
    return value


def check_choice(key: str, value: Any, choices: Collection[str]) -> str:
    """`value`, one of `choices`. Raises ConfigError."""
    if value not in choices:
        raise ConfigError(f"{key}={value} must be one of {', '.join(choices)}")
    return str(value)


def check_keys(key: str, value: Any, known: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """`value`, a mapping with exactly the keys `known`, and perhaps those of `optional`. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value} must be a mapping with the keys {', '.join(known)}")
    for name in value:
        if name not in known and name not in optional:
            raise ConfigError(f"unknown key {key}.{name}; known here: {', '.join([*known, *optional])}")
    for name in known:
        if name not in value:
            raise ConfigError(f"{key} lacks the key {name!r}; it needs {', '.join(known)}")
    return {str(name): item for name, item in value.items()}
