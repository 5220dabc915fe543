"""The import rule: who may import whom, read from the source."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("allocators", "schedulers", "routers", "engine", "experiments", "reports")
MOST_MODULES = 16
# The drawing of the house: a folder a line, what it holds behind two blanks.
FLOOR = re.compile(r"^ {4}([a-z_/]+) {2,}\S", re.M)
HOUSE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The house")[1].split("\n## ")[0]
FLOORS = FLOOR.findall(HOUSE)
LEAVES = {"kvarena.engine.classes"}  # import nothing, so that reports may import them
CONTRACT = {
    "kvarena.engine.contract",
    "kvarena.engine.errors",
    "kvarena.engine.request",
    "kvarena.engine.routing",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["kvarena", *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(tree: ast.AST) -> set[str]:
    """Names of all modules that `tree` imports: `from a import b` counts as a.b where that is a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not used here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
    return names


@cache
def imports_of(path: Path) -> set[str]:
    """Read once for all tests; not to be changed."""
    return imported_modules(ast.parse(path.read_text()))


def breaks_rule(module: str, imported: str) -> bool:
    """Whether `module` must not import `imported`."""
    package, target = (name.removeprefix("kvarena.").partition(".")[0] for name in (module, imported))
    if package in ("allocators", "schedulers", "routers"):
        own_or_contract = target == package or imported in CONTRACT
        return not own_or_contract and target not in sys.stdlib_module_names
    if package == "engine":
        return target in ("allocators", "schedulers", "routers", "experiments", "reports")
    if package == "reports":
        return target in ("engine", "allocators", "schedulers", "routers", "experiments") and imported not in LEAVES
    return False


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_module_imports_only_what_its_package_may(module):
    tree = ast.parse(MODULES[module].read_text())
    broken = sorted(name for name in imported_modules(tree) if breaks_rule(module, name))
    assert not broken, f"{module} imports {broken}"


@pytest.mark.parametrize(
    ("module", "imported", "broken"),
    [
        ("kvarena.allocators.paged", "torch", True),
        ("kvarena.allocators.paged", "kvarena.engine.core", True),
        ("kvarena.allocators.paged", "kvarena.schedulers.base", True),
        ("kvarena.allocators.paged", "kvarena.allocators.blocks", False),
        ("kvarena.schedulers.base", "kvarena.engine.contract", False),
        ("kvarena.schedulers.base", "kvarena.engine.checked", True),
        ("kvarena.schedulers.base", "kvarena.allocators.paged", True),
        ("kvarena.routers.least_kv", "kvarena.engine.routing", False),
        ("kvarena.routers.least_kv", "kvarena.schedulers.base", True),
        ("kvarena.engine.core", "kvarena.routers.least_kv", True),
        ("kvarena.engine.core", "kvarena.schedulers.base", True),
        ("kvarena.engine.core", "torch", False),
        ("kvarena.reports.html", "kvarena.engine.errors", True),
        ("kvarena.reports.html", "kvarena.engine.classes", False),
        ("kvarena.experiments.jobs.job", "kvarena.engine.core", False),
    ],
)
def test_the_rule_itself(module, imported, broken):
    assert breaks_rule(module, imported) is broken


def test_a_leaf_imports_nothing():
    assert {name for leaf in LEAVES for name in imports_of(MODULES[leaf])} == {"__future__"}


def test_every_import_names_a_module_that_is_there():
    """A module that moved is imported by its new name everywhere, in functions and in tests too."""
    files = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    names = {(path.name, name) for path in files for name in imports_of(path)}
    door = {f"kvarena.{path.stem}" for path in (ROOT / "kvarena").glob("*.py")}
    heads = {"kvarena", *PACKAGES}  # a folder of ours is no package of its own
    known = {"kvarena", *MODULES, *door}
    assert not {pair for pair in names if pair[1].partition(".")[0] in heads and pair[1] not in known}


def folder(module: str) -> str:
    return MODULES[module].parent.relative_to(ROOT).as_posix()


def test_every_folder_has_a_floor():
    assert len(set(FLOORS)) == len(FLOORS)
    assert {folder(module) for module in MODULES} == set(FLOORS) - {"kvarena"}


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_point_down(floor):
    own = [module for module in MODULES if folder(module) == floor]
    up = [
        f"{module} imports {name}"
        for module in own
        for name in imports_of(MODULES[module]) & MODULES.keys()
        if FLOORS.index(folder(name)) < FLOORS.index(floor)
    ]
    assert not up
    assert len([module for module in own if MODULES[module].name != "__init__.py"]) <= MOST_MODULES


def test_no_import_cycles():
    """Imports inside functions and for type checkers count too: they tie modules together all the same."""
    graph = {name: imports_of(path) & MODULES.keys() for name, path in MODULES.items()}
    assert find_cycle(graph) is None


def test_a_cycle_would_be_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of `graph` as a path, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph[node]):
            cycle = visit(target, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def test_strategies_and_their_runners_load_without_torch():
    names = [name for name in MODULES if name.split(".")[1] in ("allocators", "schedulers", "routers")]
    names += [
        "kvarena.engine.core",
        "kvarena.engine.ledger",
        "kvarena.experiments.correctness.oracle",
        "kvarena.experiments.simulation.runner",
    ]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
