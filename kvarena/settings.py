"""Settings as Python values, as the overrides of run.py's command line.

workload={"num_requests": 8}, **{"workload.num_requests": 8}, overrides=["workload.num_requests=8"]     the same
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.outside import GROUPS, offer

Strategy = str | Callable[..., Any]
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
WORDS = ("true", "false", "null", "nan", "inf")  # what would not be read as text


def as_overrides(settings: Mapping[str, Any], *, swept: bool = False) -> list[str]:
    """The overrides that `settings` stand for.

    Args:
        settings: by key, with dots or as a section: `{"workload.num_requests": 8}` or `{"workload": {"num_requests":
            8}}`; a group by the name of its choice (`{"workload": "lognormal"}`); `allocator`, `scheduler` and
            `router` also by a class of the caller's.
        swept: a list holds the values of a sweep; else it is a value.

    Raises:
        ConfigError: a value that no setting can have; two classes of one name.
    """
    made, named = [], dict[str, Any]()
    for key, value in _flat(settings):
        values = list(value) if swept and isinstance(value, list | tuple) else [value]
        if not values:
            raise ConfigError(f"{key}=[] sweeps over nothing; give it a value")
        texts = []
        for one in values:
            if key in GROUPS and not isinstance(one, str):
                name = offer(key, one)
                if named.setdefault(f"{key}={name}", one) is not one:
                    raise ConfigError(f"two classes for {key} are called {name}; rename one")
                texts.append(name)
            else:
                texts.append(_text(key, one))
        made.append(f"{key}={','.join(texts)}")
    return made


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(key, value) pairs, with the sections opened."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:
            pairs += [(f"{key}.{inner}", one) for inner, one in value.items()]
        else:
            pairs.append((key, value))
    return pairs


def _text(key: str, value: Any) -> str:
    """A value in Hydra's override grammar."""
    if hasattr(value, "item") and not isinstance(value, Mapping | Sequence):
        value = value.item()  # a number of numpy's
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        text = str(value)
        is_plain = PLAIN.fullmatch(text) and text.lower() not in WORDS
        return text if is_plain else QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(key, one) for one in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_text(key, name)}:{_text(key, one)}' for name, one in value.items())}}}"
    raise ConfigError(f"{key}={value!r} must be a number, text, true, false, null, a list or a section of these")
