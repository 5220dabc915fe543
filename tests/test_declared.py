"""What is imported is declared in pyproject.toml, and what the main job imports is no extra's."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
from test_import_rule import MODULES, ROOT, imported_modules

from kvarena.reports.reading.packages import EXTRAS, missing_extra

DOOR = {f"kvarena.{path.stem}": path for path in (ROOT / "kvarena").glob("*.py") if path.stem != "__init__"}
OURS = MODULES | DOOR
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages whose module has another name, and those that others import for us.
MODULE_OF = {
    "pillow": "PIL", "hydra-core": "hydra", "prometheus-client": "prometheus_client", "pyyaml": "yaml",
    "protobuf": "google", "typing-extensions": "typing_extensions", "cuda-bindings": "cuda",
    "humming-kernels": "humming", "pyzmq": "zmq",
    "mlflow-skinny": "mlflow", "opentelemetry-sdk": "opentelemetry",
}  # fmt: skip
FOR_OTHERS = {
    "accelerate",  # transformers, for a model on a GPU
    "nvidia-cuda-nvrtc",  # cuda-bindings
    "vllm-router",  # a command of its own
    "hydra-joblib-launcher", "hydra-submitit-launcher",  # Hydra finds them
    "sqlalchemy", "alembic",  # mlflow's store
    "opentelemetry-exporter-otlp-proto-http",
}  # fmt: skip
# The main job, its sweeps and experiments, the Python API but for LLM, and reports.
MAIN = (
    "kvarena.experiments.entry",
    "kvarena.running",
    "kvarena.results",
    "kvarena.summaries",
    "kvarena.reports.__main__",
)


def distributions(requirements: Iterable[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


CORE = distributions(PROJECT["dependencies"])
OPTIONAL = {
    extra: distributions(requirements) - {"kvarena"}
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra != "dev"
}


def modules_of(names: Iterable[str]) -> set[str]:
    return {MODULE_OF.get(name, name) for name in names}


@cache
def imports_of(module: str, late: bool) -> set[str]:
    """All that a module imports; without `late` what its head does. Read once; not to be changed."""
    tree = ast.parse(OURS[module].read_text())
    return imported_modules(tree if late else ast.Module(list(head(tree)), []))


def foreign(module: str, late: bool = True) -> set[str]:
    """Top-level packages of others that a module imports; without `late` those of its head alone."""
    tops = {name.partition(".")[0] for name in imports_of(module, late)}
    return tops - set(sys.stdlib_module_names) - {"kvarena"}


def head(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs when a module is imported."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try):
            yield from head(ast.Module(node.body, []))


def reached(starts: Iterable[str], late: bool = True) -> set[str]:
    """Our modules that these import, and so on."""
    seen: set[str] = set()
    left = list(starts)
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += imports_of(module, late) & OURS.keys()
    return seen


def test_all_that_is_imported_is_declared_and_the_other_way_round():
    imported = set().union(*(foreign(module) for module in OURS))
    declared = CORE.union(*OPTIONAL.values())
    assert imported == modules_of(declared - FOR_OTHERS) | (imported & FOR_OTHERS)


def test_the_main_job_needs_no_extra():
    """What it imports at its head; within functions only what the option that asks for it needs."""
    modules = reached(MAIN, late=False)
    assert len(modules) > 30
    assert not set().union(*(foreign(module, late=False) for module in modules)) - modules_of(CORE)
    beside_server = {module for module in reached(MAIN) if not module.startswith("kvarena.engine.server.")}
    late = set().union(*(foreign(module) for module in beside_server)) - modules_of(CORE)
    # uvloop: where it is there, it carries the HTTP client
    assert late == {"cuda", "humming", "mlflow", "modelscope", "ray", "uvloop", "wandb"}


def test_extras_are_named_as_they_are_declared():
    """`packages.py` must know them where nothing is installed that could be asked."""
    for extra, modules in EXTRAS.items():
        assert set(modules) <= modules_of(OPTIONAL[extra]) | {"joblib", "submitit"}, extra
    used = set().union(*(foreign(module) for module in OURS)) - modules_of(CORE)
    assert used <= {module for modules in EXTRAS.values() for module in modules}


@pytest.mark.parametrize("name", ["LLM", "SamplingParams"])
def test_without_the_servers_packages_a_name_that_needs_them_is_one_line(name):
    code = f"""
import sys
sys.modules["starlette"] = None
import kvarena
try:
    kvarena.{name}
except kvarena.KvarenaError as error:
    print(error)
print(kvarena.run.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    line, rest = done.stdout.splitlines()
    assert "starlette" in line and "pip install 'kvarena[serve]'" in line and rest == "run"


def test_an_extra_that_is_whole_is_not_missed(monkeypatch):
    assert missing_extra("serve") is None
    monkeypatch.setitem(EXTRAS, "serve", ("no_such_package",))
    assert "no_such_package" in missing_extra("serve")
