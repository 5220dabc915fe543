"""What settings must be. Each check's error is one line: the key, its value, and what it must be.

check_int("scheduler.max_num_seqs", value, 1)            where a class takes its options
dtype: Annotated[str, one_of("auto", "float32")]         in a frozen dataclass that derives from `Section`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeGuard, cast, get_type_hints

from kvarena.engine.errors import ConfigError


@dataclass(frozen=True)
class Must:
    """What a value must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    @property
    def or_null(self) -> Must:
        """The same, or None."""
        return Must(f"{self.words}, or null", lambda value: value is None or self.holds(value))

    def check(self, key: str, value: Any) -> Any:
        """`value`. Raises ConfigError unless it is this."""
        require(self.holds(value), key, value, self.words)
        return value


def require(ok: bool, key: str, value: object, must: str) -> None:
    """Raise ConfigError unless `ok`; `key` is the setting as the user spells it."""
    if not ok:
        # As it is typed; text that is empty or reads as a number is not to be taken for one.
        shown = repr(value) if isinstance(value, str) and not value[:1].isalpha() else value
        raise ConfigError(f"{key}={shown} must be {must}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(low: int, high: int | None = None) -> Must:
    """An integer in [low, high]."""
    words = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    return Must(words, lambda value: is_int(value) and low <= value and (high is None or value <= high))


def number(low: float = 0.0, *, above: bool = False) -> Must:
    """A finite number of at least (`above`: greater than) `low`."""
    return Must(
        f"a finite number {'above' if above else 'of at least'} {low:g}",
        lambda value: is_number(value) and math.isfinite(value) and (value > low if above else value >= low),
    )


def one_of(*choices: str) -> Must:
    """One of some words."""
    return Must(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


TRUTH = Must("true or false", lambda value: isinstance(value, bool))
TEXT = Must("text", lambda value: isinstance(value, str) and bool(value))
NUMBER = Must("a number", is_number)
SHARE = Must("in (0, 1]", lambda value: is_number(value) and 0 < value <= 1)
SECONDS = Must("above 0 (seconds)", lambda value: is_number(value) and value > 0)


def check_int(key: str, value: Any, low: int, high: int | None = None) -> int:
    """`value`, an integer in [low, high]. Raises ConfigError."""
    return int(integer(low, high).check(key, value))


def check_number(key: str, value: Any, low: float = 0.0, *, above: bool = False) -> float:
    """`value`, a finite number of at least (`above`: greater than) `low`. Raises ConfigError."""
    return float(number(low, above=above).check(key, value))


def check_bool(key: str, value: Any) -> bool:
    """`value`, true or false. Raises ConfigError."""
    return bool(TRUTH.check(key, value))


def check_choice(key: str, value: Any, choices: Collection[str]) -> str:
    """`value`, one of `choices`. Raises ConfigError."""
    return str(one_of(*choices).check(key, value))


def check_keys(key: str, value: Any, known: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """`value`, a mapping with exactly the keys `known`, and perhaps those of `optional`. Raises ConfigError."""
    require(isinstance(value, Mapping), key, value, f"a mapping with the keys {', '.join(known)}")
    for name in value:
        if name not in known and name not in optional:
            raise ConfigError(f"unknown key {key}.{name}; known here: {', '.join([*known, *optional])}")
    for name in known:
        if name not in value:
            raise ConfigError(f"{key} lacks the key {name!r}; it needs {', '.join(known)}")
    return {str(name): item for name, item in value.items()}


@dataclass(frozen=True)
class Section:
    """Base of the frozen dataclasses that are sections of a config. Fields state what they must be in `Annotated`.

    Raises:
        ConfigError: a value is not what it must be; the message names it by `section` and the field.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for name, must in _musts(cast(Any, type(self))):
            must.check(f"{self.section}.{name}", getattr(self, name))


@cache
def _musts(kind: type[Section]) -> list[tuple[str, Must]]:
    """What each field must be, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    return [(name, must) for name, hint in hints.items() for must in getattr(hint, "__metadata__", ())]
