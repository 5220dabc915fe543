"""What vLLM's end-to-end tests import of vLLM, as far as a test of a server needs it, and the report of each test.

A plugin of pytest (`-p stand_in`), for the process that runs the tests; `run_vllm.py` starts it. Modules of `vllm` that
are not named here are empty: what a test takes of them is a class that does nothing, so that a file with unit tests of
vLLM's own classes can be imported. Those tests are in `left_out.txt`.
"""

from __future__ import annotations

import fnmatch
import importlib.abc
import importlib.machinery
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

HERE = Path(__file__).parent


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def _tokenizer(tokenizer_name: str, **_: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_name)


def _hub() -> Any:
    """Nothing is downloaded: adapters are not what is tested."""
    hub = MagicMock()
    hub.snapshot_download.side_effect = lambda repo_id, **_: f"adapters/{repo_id}"
    return hub


class _ModelConfig:
    """Of a model: how large its vocabulary is."""

    def __init__(self, model: str, **_: Any) -> None:
        self._folder = Path(model)

    def get_vocab_size(self) -> int:
        return int(json.loads((self._folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


NAMED: dict[str, dict[str, Any]] = {
    "vllm.tokenizers": {"get_tokenizer": _tokenizer},
    "vllm.utils.network_utils": {"get_open_port": _free_port},
    "vllm.transformers_utils.repo_utils": {"hf_api": _hub},
    "vllm.config": {"ModelConfig": _ModelConfig},
    "vllm.version": {"__version__": os.environ.get("JUDGED_VERSION", ""), "_prev_minor_version": lambda: "0.32"},
    "vllm.envs": {"VLLM_USE_RUST_FRONTEND": False},
    "vllm.platforms": {"current_platform": MagicMock(**{"is_rocm.return_value": False, "is_xpu.return_value": False})},
}


class _Module(ModuleType):
    """A module whose names are all classes that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in NAMED:
            return importlib.import_module(f"{self.__name__}.{name}")
        base = (Exception,) if name.endswith(("Error", "Exception")) else ()
        made = type(name, base, {"__getitem__": lambda self, key: self})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(NAMED.get(module.__name__, {}))


sys.meta_path.insert(0, _Finder())


@pytest.fixture
def local_asset_server() -> None:
    """Pictures for models that read them: their cases are left out."""


def left_out() -> list[tuple[str, str]]:
    """Patterns of node ids, each with the reason."""
    rows = []
    for line in (HERE / "left_out.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern, reason = line.split("  ", 1)
            rows.append((pattern.replace("[", "[[]"), reason.strip()))
    return rows


def _write(row: dict[str, Any]) -> None:
    with open(os.environ["JUDGE_OUT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _short(nodeid: str) -> str:
    return nodeid.removeprefix("tests/entrypoints/")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what the list names."""
    rules, kept, dropped = left_out(), [], []
    for item in items:
        name = _short(item.nodeid)
        reason = next((why for pattern, why in rules if fnmatch.fnmatchcase(name, pattern)), None)
        if reason is None:
            kept.append(item)
        else:
            dropped.append(item)
            _write({"test": name, "result": "left out", "why": reason})
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be read is a failure of its own."""
    if report.failed:
        _write({"test": _short(report.nodeid), "result": "failed", "why": str(report.longrepr)[-500:]})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """A line for each test."""
    report = (yield).get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed):
        why = "" if report.passed else f"{call.excinfo.typename}: {call.excinfo.value}"[:600]
        _write({"test": _short(item.nodeid), "result": report.outcome, "why": why})
