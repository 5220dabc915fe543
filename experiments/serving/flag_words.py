"""Command lines of `vllm serve` in this parser's words: spelling, files of flags, and flags that do nothing here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvarena.engine.errors import ConfigError
from kvarena.experiments.serving.flag_values import is_same
from kvarena.experiments.serving.foreign_flags import Foreign

_TRUTHS = {"true": True, "false": False}


class Nothing(argparse.Action):
    """A flag without an effect, or one that is refused.

    Args:
        foreign: what it is.
        options: as of `argparse.Action`.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, foreign: Foreign, **options: Any) -> None:
        self._foreign = foreign
        nargs: Any = {"switch": 0, "value": None, "values": "+"}[foreign.takes]
        if foreign.refused and foreign.takes != "switch":
            nargs = "*"  # whatever is given: the reason counts, not the number of values
        super().__init__(option_strings, dest, nargs=nargs, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Say why where it is refused."""
        del namespace
        foreign, given = self._foreign, values if isinstance(values, str) else ""
        if foreign.takes == "switch" and str(option).startswith("--no-"):
            return
        if foreign.refused:
            parser.error(f"{option} is refused: {foreign.because}")
        if foreign.only and not any(is_same(given, value) for value in foreign.only):
            parser.error(f"{option} {given} is refused: {foreign.because}; taken is {' or '.join(foreign.only)}")


def said_of(foreign: Foreign) -> str:
    """A flag's line, for help and docs."""
    if foreign.refused:
        return foreign.because
    return f"{' or '.join(foreign.only)}: {foreign.because}; else refused" if foreign.only else foreign.because


def spelled(parser: argparse.ArgumentParser, args: Iterable[str]) -> Iterator[str]:
    """Arguments in this parser's spelling: dashes; `--x=true` and `--x false` of a switch; `--x.y=1` of no effect."""
    actions = parser._option_string_actions
    waiting = ""  # a switch, whose value may follow
    for arg in args:
        truth = _TRUTHS.get(arg.lower())
        if waiting and truth is not None:
            yield waiting if truth else f"--no-{waiting[2:]}"
            waiting = ""
            continue
        if waiting:
            yield waiting
            waiting = ""
        if not arg.startswith("--"):
            yield arg
            continue
        name, equals, value = arg.partition("=")
        name = "--" + name[2:].replace("_", "-")
        whole = name.partition(".")[0]
        if name not in actions and isinstance(actions.get(whole), Nothing):
            name = whole
        has_opposite = f"--no-{name[2:]}" in actions
        if has_opposite and equals and value.lower() in _TRUTHS:
            yield name if _TRUTHS[value.lower()] else f"--no-{name[2:]}"
        elif has_opposite and not equals:
            waiting = name
        else:
            yield f"{name}{equals}{value}"
    if waiting:
        yield waiting


def read_file(path: str) -> dict[str, Any]:
    """Flags of a YAML file, by their names with dashes. Raises ConfigError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"--config {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold flags by their names, such as max-model-len: 4096")
    made = {str(key).replace("_", "-"): value for key, value in content.items()}
    if "config" in made:
        raise ConfigError(f"--config {path} names another file; one is read")
    return made


def as_arguments(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> Iterator[str]:
    """Flags of a file as words of a command line."""
    for key, value in values.items():
        action = parser._option_string_actions.get(f"--{key}")
        if isinstance(value, bool) and (action is None or action.nargs == 0):
            if value:
                yield f"--{key}"
            elif f"--no-{key}" in parser._option_string_actions:
                yield f"--no-{key}"
            else:
                yield f"--{key}=false"  # which says that it is unknown, or takes no value
        elif isinstance(value, list) and (action is None or action.nargs in ("+", "*")):
            yield from (f"--{key}", *map(str, value))
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            yield from (f"--{key}={item}" for item in value)
        elif value is not None:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict | list | bool) else value}"
