"""What was meant, where Hydra cannot compose a config: the group, the choice or the key that is most like it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvarena.experiments.settings.compose import CONF_DIR, load_config
from kvarena.experiments.settings.conf_files import options
from kvarena.experiments.settings.near import either, near

EXPERIMENTS = "experiment"  # the group whose choices make section `study`
TWICE = r"Multiple values for (\S+?)\.|(\S+) appears more than once in the final defaults list"
UNKNOWN = (
    r"Could not override '([^']+)'",
    r"Key '([^']+)' is not in struct",
    r"Could not delete from config\. '([^']+)'",
)


def explain_composition(error: BaseException, overrides: Sequence[str]) -> str | None:
    """One line about a command line that makes no config; None where its fault is another one.

    Args:
        error: what Hydra or OmegaConf raised.
        overrides: the command line; its choices say which keys there are.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return _no_such_choice(str(error.missing_cfg_file), [str(option) for option in error.options])
    if isinstance(error, OverrideParseException) and "missing EQUAL" in text:
        return _no_value(error.override, overrides)
    nameless = next((one for one in overrides if not re.match(r"[^=]*\w|-", one)), None)
    if nameless is not None:
        return f"the command line cannot be read: {nameless!r} names no setting; settings are key=value"
    if isinstance(error, OverrideParseException):
        reason = re.sub(r" See https://hydra\.cc\S+.*|^\w+Exception: ", "", text)
        where = "" if error.override in reason else f"{error.override!r}: "
        return f"the command line cannot be read: {where}{reason}"
    if twice := re.search(TWICE, text):
        group = twice[1] or twice[2]
        return f"{group} is there already: type {_typed(group, overrides)}, without the +"
    for pattern in UNKNOWN:
        if key := re.search(pattern, text):
            return _no_such_key(key[1], overrides)
    return None


def unknown_key(key: str, overrides: Sequence[str] = ()) -> str:
    """One line about a setting that nothing reads."""
    return f"unknown config key {key!r}{_suggestion(key, overrides)}"


def _no_such_choice(given: str, options: list[str]) -> str:
    group, _, name = given.partition("/")
    if group == "hydra":
        head, _, name = name.partition("/")
        group = f"hydra/{head}"
    found = near(name, options)
    meant = f"; did you mean {either(found)}?" if found else "."
    if group == "model" and Path(name).is_dir():
        meant = f"; a directory is given as model.path={name}."
    return f"{group}={name}: there is no such choice{meant} Available options in '{group}': {', '.join(options)}"


def _no_value(override: str, overrides: Sequence[str]) -> str:
    known = list(_keys(overrides))
    name = override.lstrip("+~")
    found = [name] if name in known else near(name, known)
    meant = f", such as {either(f'{one}=...' for one in found)}" if found else ""
    return f"the command line cannot be read: {override!r} has no value; settings are key=value{meant}"


def _typed(group: str, overrides: Sequence[str]) -> str:
    given = next((one for one in overrides if one.lstrip("+").startswith(f"{group}=")), f"{group}=NAME")
    return given.lstrip("+")


def _no_such_key(key: str, overrides: Sequence[str]) -> str:
    if key in _keys(()) or (CONF_DIR / key).is_dir():
        if any(one.startswith("~") and one.lstrip("~").partition("=")[0] == key for one in overrides):
            return f"{key} is needed: leave ~{key} out"
        if any(one.partition("=")[0] == key and one.partition("=")[2][:1] == "{" for one in overrides):
            return f"{key} takes the name of a choice; set what is in it one by one: {key}.NAME=VALUE"
    return unknown_key(key, overrides)


def _suggestion(key: str, overrides: Sequence[str]) -> str:
    """The config keys most like `key`, for the error line."""
    if owners := _keys_of_choices().get(key):
        return f"; it is a setting of {', '.join(owners)}: choose one of these"
    if key.startswith(("hydra.", "hydra/")):
        return _hydra_suggestion(key)
    known = [name for name in _keys(overrides) if name != key]
    last = key.rpartition(".")[2]
    same = [name for name in known if "." in name and name.rpartition(".")[2] == last]
    if same and len(same) <= 3:  # seed=3 for workload.seed=3
        return f"; did you mean {either(same)}?"
    others = {name: choices[0] for name, choices in _keys_of_choices().items()}
    if not same and (choices := [f"{name} (of {others[name]})" for name in others if name.rpartition(".")[2] == last]):
        return f"; did you mean {either(choices[:3])}?"
    sections = [name for name in known if "." not in name]
    found = (near(key, sections) if "." not in key else []) or near(key, dict.fromkeys([*known, *others]))
    if found:
        return f"; did you mean {either(name if name in known else f'{name} (of {others[name]})' for name in found)}?"
    section = key.rpartition(".")[0]
    listed = [name for name in known if section and name.startswith(f"{section}.")] or sections
    return f"; known: {', '.join(listed)}"


def _hydra_suggestion(key: str) -> str:
    found = near(key, ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra/launcher",
                       "hydra/sweeper", "hydra.launcher.n_jobs", "hydra.sweeper.params"))  # fmt: skip
    return f"; did you mean {either(found)}?" if found else "; python run.py --cfg hydra shows what there is"


def _keys(overrides: Sequence[str]) -> list[str]:
    """Every key of the config that the choices of a command line make, or of the default one where these are none."""
    choices = [one.lstrip("+").partition(",")[0] for one in overrides if _is_choice(one)]
    try:
        config = load_config(choices)
    except (HydraException, OmegaConfBaseException, ValueError):
        config = load_config()
    return [*_names(OmegaConf.to_container(config), ""), EXPERIMENTS]


def _is_choice(override: str) -> bool:
    name, _, value = override.lstrip("+").partition("=")
    return (CONF_DIR / name).is_dir() and name != "hydra" and bool(re.match(r"[\w.-]+", value))


def _names(node: object, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            if not str(name).startswith("_"):
                yield f"{prefix}{name}"
                yield from _names(child, f"{prefix}{name}.")


@cache
def _keys_of_choices() -> dict[str, list[str]]:
    """Every key that a choice of some group has, with those that have it: `arrival.rate` is one of arrival=poisson."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF_DIR.glob("*/*.yaml")):
        group = path.parent.name
        if group in ("base", "hydra", "profile"):
            continue
        node, section = (options(path).get("study"), "study") if group == EXPERIMENTS else (options(path), group)
        for name in _names(node, f"{section}."):
            found.setdefault(name, []).append(f"{group}={path.stem}")
    return found
