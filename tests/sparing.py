"""What tests are spared unless they look at it: 3 s of processor time for a page's figures, 1.3 s for a cell's probe.

A command's config is composed once, not first to look for `hydra.mode` in it, which no file of ours sets, and the same
command's of later tests is a copy: 0.1 s each time. Of commands that choose the same files, which files these are and
what they make together is found once. So is which of its functions Triton's interpreter replaces at each launch, and
the certificates that no client here needs.

Figures are made as ever, from the same data; what an own page shows of them is an empty picture. A test that looks at
pictures has the marker `drawn`, one that looks at the probe `probed`. Both hold for the processes of warm.py, too.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import gc
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
EMPTY = '<svg width="1pt" height="1pt" viewBox="0 0 1 1" xmlns="http://www.w3.org/2000/svg"></svg>'
gc.disable()  # while imports alone run, which make no garbage: 1.4 s for each worker (on again in conftest.py)

ROOT = Path(__file__).resolve().parents[1]
drawn = probed = False  # by the test that runs
_originals: dict[str, Any] = {}
_composed: dict[tuple[Any, ...], Any] = {}
_builtins: dict[Any, list[str]] = {}


def set_for_test(*, is_drawn: bool, is_probed: bool) -> None:
    """Spare the test that is about to run, or the process that starts, what it does not look at."""
    global drawn, probed
    drawn, probed = is_drawn, is_probed
    # Where no kernel has been compiled yet a line on stderr says that some are, whichever test is the first.
    importlib.import_module("kvarena.engine.cpu.compiler")._Telling.told = True
    # Only what is loaded: a test that draws nothing does not pay for the import.
    _replace("matplotlib.figure", "Figure.savefig", _save_nothing, not drawn)
    _replace("kvarena.experiments.recording.contention", "run_probe", _quiet_machine, not probed)
    _replace("hydra._internal.config_loader_impl", "ConfigLoaderImpl.load_configuration", _compose_once, True)
    _replace(
        "hydra._internal.config_loader_impl", "ConfigLoaderImpl._compose_config_from_defaults_list", _merge_once, True
    )
    _replace("hydra._internal.defaults_list", "_create_defaults_list", _choose_once, True)
    _replace("hydra._internal.config_loader_impl", "ConfigLoaderImpl._process_config_searchpath", _search, True)
    _replace("hydra._internal.config_repository", "CachingConfigRepository.__init__", _share, True)
    _replace("hydra._internal.hydra", "Hydra.get_mode", _mode, True)
    _replace("triton.runtime.interpreter", "_patch_builtin", _patch_known, True)
    _replace("httpx._transports.default", "create_ssl_context", _ssl_context_once, True)


@contextlib.contextmanager
def nothing_spared() -> Iterator[None]:
    """For fixtures whose pages several tests look at, whichever test is the first."""
    before = {"is_drawn": drawn, "is_probed": probed}
    set_for_test(is_drawn=True, is_probed=True)
    try:
        yield
    finally:
        set_for_test(**before)


def _replace(module: str, name: str, by: Any, spared: bool) -> None:
    if module not in sys.modules:
        return
    owner: Any = sys.modules[module]
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = _originals.setdefault(name, getattr(owner, last))
    setattr(owner, last, by if spared else original)


def _save_nothing(self: Any, file: str | Path | IO[str], *, format: str, **_: Any) -> None:
    if format == "svg":
        file.write(EMPTY)  # type: ignore[union-attr]
    else:
        Path(file).write_bytes(PIXEL)  # type: ignore[arg-type]


def _compose_once(
    self: Any,
    config_name: str | None,
    overrides: list[str],
    run_mode: Any,
    from_shell: bool = True,
    validate_sweep_overrides: bool = True,
) -> Any:
    """Of commands alone, whose configs hang on nothing but what is in the key and our own conf/."""

    def compose() -> Any:
        original = _originals["ConfigLoaderImpl.load_configuration"]
        return original(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)

    paths = tuple(element.path for element in self.config_search_path.get_path())
    if not from_shell or any("searchpath" in one for one in overrides) or not _is_ours(paths):
        return compose()
    key = (paths, config_name, *overrides, run_mode, validate_sweep_overrides, os.getcwd())
    return pickle.loads(_kept(key, lambda: pickle.dumps(compose())))


def _share(self: Any, delegate: Any) -> None:
    self.delegate, self.cache = delegate, {}


def _search(self: Any, config_name: str | None, parsed_overrides: list[Any], repo: Any) -> None:
    """Of our files none sets `hydra.searchpath`, so they are not looked through for it, nor copied before it is."""
    said = any(one.get_key_element() == "hydra.searchpath" for one in parsed_overrides)
    if said or not _is_ours(tuple(source.path for source in repo.get_sources())):
        repo.delegate = copy.deepcopy(repo.delegate)
        _originals["ConfigLoaderImpl._process_config_searchpath"](self, config_name, parsed_overrides, repo)


def _choose_once(repo: Any, config_name: str | None, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
    """The files that the chosen groups make up, and what `overrides` then knows of them."""

    def choose() -> Any:
        made = _originals["_create_defaults_list"](repo, config_name, overrides, prepend_hydra, skip_missing)
        return *made, {name: value for name, value in vars(overrides).items() if name != "config_overrides"}

    paths = tuple(source.path for source in repo.get_sources())
    if not _is_ours(paths):
        return choose()[:2]
    asked = (overrides.override_choices, [vars(one) for one in overrides.append_group_defaults], overrides.deletions)
    files, tree, known = _kept((config_name, repr(asked), prepend_hydra, skip_missing), choose)
    vars(overrides).update(copy.deepcopy(known))
    return list(files), tree


def _merge_once(self: Any, defaults: list[Any], repo: Any) -> Any:
    """What the files make together, before a command's settings."""

    def merge() -> Any:
        return _originals["ConfigLoaderImpl._compose_config_from_defaults_list"](self, defaults, repo)

    if not _is_ours(tuple(source.path for source in repo.get_sources())):
        return merge()
    return pickle.loads(_kept(tuple(map(dataclasses.astuple, defaults)), lambda: pickle.dumps(merge())))


def _patch_known(package: Any, builder: Any, scope: Any) -> None:
    """Which members of a package are Triton's own is looked up once, not for each launch."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    is_builtin = interpreter.tl.core.is_builtin  # type: ignore[attr-defined]
    if package not in _builtins:
        _builtins[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
    for name in _builtins[package]:
        if is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)  # type: ignore[attr-defined]


def _ssl_context_once(verify: Any = True, cert: Any = None, trust_env: bool = True) -> Any:
    """Certificates are read once, not for each client."""
    make = _originals["create_ssl_context"]
    if verify is not True or cert is not None or {"SSL_CERT_FILE", "SSL_CERT_DIR"} & set(os.environ):
        return make(verify=verify, cert=cert, trust_env=trust_env)
    if "ssl" not in _originals:
        _originals["ssl"] = make(trust_env=trust_env)
    return _originals["ssl"]


def _kept(key: tuple[Any, ...], make: Any) -> Any:
    """A copy of what `make` gave for this key the first time; whoever changes it copies it again."""
    from hydra.core.config_store import ConfigStore

    nodes = tuple(_leaves(ConfigStore.instance().repo))  # an installed strategy is another one
    key = (*key, *map(id, nodes))
    if key not in _composed:
        if len(_composed) > 300:
            _composed.clear()
        _composed[key] = copy.deepcopy(make()), nodes  # while they live no other one has their ids
    return _composed[key][0]


def _mode(self: Any, config_name: str | None, overrides: list[str]) -> Any:
    said = any("hydra.mode" in one for one in overrides)
    return _originals["Hydra.get_mode"](self, config_name, overrides) if said else None


def _is_ours(paths: tuple[str, ...]) -> bool:
    files = [Path(path.removeprefix("file://")) for path in paths if path.startswith(("file:", "/"))]
    return [path.resolve() for path in files] == [ROOT / "conf"]


def _leaves(tree: Any) -> Iterator[Any]:
    for branch in tree.values():
        if isinstance(branch, dict):
            yield from _leaves(branch)
        else:
            yield branch


def _quiet_machine(*_: Any, **__: Any) -> Any:
    return sys.modules["kvarena.experiments.recording.contention"].Probe(1000.0, 0.0)
