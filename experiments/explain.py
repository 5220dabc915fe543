"""What an error says to a person: one line, with the cause that Hydra hides and the setting that was meant."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import KvarenaError
from experiments.compose import CONF_DIR, load_config
from reports.errors import ReportError

EXPERIMENTS = "experiment"  # the group whose choices make section `study`


def explain(error: BaseException) -> str | None:
    """One line for a person, or None when `error` is not the user's doing but a bug."""
    own = own_error(error)
    if own is not None:
        return str(own)
    if isinstance(error, ReportError):
        return str(error)
    if isinstance(error, MemoryError):
        what = f" ({first_line(error)})" if str(error) else ""
        return f"this machine's memory is not enough{what}; lower kv_cache.num_slots or workload.num_requests"
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error, _causes(error))
    if _raised_in(error) == "submitit":
        return f"hydra/launcher: {error}"
    if isinstance(error, (TypeError, ValueError)) and _raised_in(error) == "hydra":
        return f"the command line cannot be read: {first_line(error)}"
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = " ".join(str(error).split())
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if key:
        return f"unknown config key {key[1]!r}{_suggestion(key[1])}"
    return text


def _raised_in(error: BaseException) -> str:
    """The package whose code raised `error`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def own_error(error: BaseException) -> KvarenaError | None:
    """The error that kvarena raised, if there is one behind `error`."""
    return next((cause for cause in _causes(error) if isinstance(cause, KvarenaError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return chain


def _explain_instantiation(error: InstantiationException, chain: list[BaseException]) -> str | None:
    """A constructor refused its arguments: a wrong type in the config, else a bug."""
    section = re.search(r"full_key: (\S+)", str(error))
    where = f"config section {section[1]!r}: " if section else ""
    cause = chain[-1]
    if isinstance(cause, MemoryError):
        return f"{where}{explain(cause)}"
    loading = next((link.__cause__ for link in chain if str(link).startswith("Error loading '")), None)
    if target := re.search(r"Error locating target '([^']+)'", str(error)):
        return f"{where}_target_={target[1]} cannot be loaded: {_with_place(loading or cause)}"
    return f"{where}{cause}" if isinstance(cause, (TypeError, ValueError, OverflowError)) else None


def _with_place(error: BaseException) -> str:
    """What was wrong with a module that is being imported, and in which line."""
    said = first_line(error)
    if isinstance(error, SyntaxError):  # says it itself
        return said
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_name != "<module>":  # nothing of the module's own
        return said
    return f"{said} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"


def _suggestion(key: str) -> str:
    """The config keys most like `key`, for the error line."""
    known: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                known.append(f"{prefix}{name}")
                walk(child, f"{prefix}{name}.")

    if owners := _owners(key):
        return f"; it is a setting of {', '.join(owners)}: choose one of these"
    walk(OmegaConf.to_container(load_config()), "")
    known = [name for name in known if name != key]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if not near:
        section = key.rsplit(".", 1)[0]
        near = [name for name in known if name.startswith(f"{section}.")] or [n for n in known if "." not in n]
        return f"; known: {', '.join(near)}"
    return f"; did you mean {' or '.join(near)}?"


def _owners(key: str) -> list[str]:
    """The choices of config groups whose own files have this setting: `arrival.rate` is one of arrival=poisson."""
    group, _, inner = key.partition(".")
    folder, path = (EXPERIMENTS, key) if group == "study" else (group, inner)
    files = sorted((CONF_DIR / folder).glob("*.yaml")) if inner else []
    return [f"{folder}={file.stem}" for file in files if _has(OmegaConf.load(file), path)]


def _has(node: Any, path: str) -> bool:
    for name in path.split("."):
        if not OmegaConf.is_dict(node) or name not in node:
            return False
        node = node._get_node(name)
    return True


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
