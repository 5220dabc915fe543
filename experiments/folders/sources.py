"""Which code and which files a result comes from, by their content.

Git does not answer that: a new file is untracked, a class may lie outside the checkout, a wheel has no history. So the
sources themselves are hashed, as this process found them when it first asked.

    engine, experiments                  all of it, for every cell
    allocators, schedulers, routers      the files that the cell's own strategy imports, one by another
    any other `_target_` of the config   its file, and what it imports from beside it
    reports                              apart: it changes what is printed, not what was measured

conf counts through the resolved config. A file or folder that the config names (a trace, a checkpoint, a profile) is
hashed too, but as a part of the config: another trace is another cell.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvarena.experiments.settings.outside import sources_of_callers, with_bases
from kvarena.experiments.settings.targets import leaves

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kvarena"
SHARED_PACKAGES = ("engine", "experiments")
STRATEGY_PACKAGES = ("allocators", "schedulers", "routers")
REPORTS_PACKAGE = "reports"
SUFFIXES = (".py", ".cu")
# Sections that change neither what is measured nor how.
UNMEASURED = ("report", "sweep", "study", "server", "tracking")
INPUT_KEYS = ("path", "profile", "file")  # settings that name a file or a folder; also any value with a slash
MOST_HASHED = 64 * 2**20  # bytes of a file; a larger one goes by its size and its time of change


def digest(value: Any) -> str:
    """24 hex digits of a JSON value."""
    return _hash([json.dumps(value, sort_keys=True, default=str).encode()])


def sources_of(config: dict[str, Any], root: Path = PROJECT_ROOT) -> dict[str, Any]:
    """The code that a cell runs.

    Args:
        config: the cell's resolved config, without the sections that measure nothing.
        root: what holds the packages: a checkout, or site-packages.

    Returns:
        `hash` over all; `packages` (a digest each) and `strategy` (a digest of each file).
    """
    packages = {name: package_digest(name, root) for name in SHARED_PACKAGES}
    named = [value for key, value in leaves(config) if key.rpartition(".")[2] == "_target_" and isinstance(value, str)]
    targets = with_bases(named)
    callers = {name: _hash([text.encode()]) for name, text in sources_of_callers(targets).items()}
    strategy = dict(sorted((dict(_strategy_files(targets, root)) | callers).items()))
    return {"hash": digest([packages, strategy]), "packages": packages, "strategy": strategy}


def code_hash(root: Path = PROJECT_ROOT) -> str:
    """A digest of all packages that a measurement may use, every strategy included."""
    return digest([package_digest(name, root) for name in (*SHARED_PACKAGES, *STRATEGY_PACKAGES)])


@functools.cache
def package_digest(name: str, root: Path = PROJECT_ROOT) -> str:
    """A digest of a package's source files and their names; the same for a checkout and for its wheel."""
    folder = root / name
    files = sorted(path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}"))
    return _hash(part for path in files for part in (path.relative_to(root).as_posix().encode(), path.read_bytes()))


def inputs_of(config: dict[str, Any]) -> dict[str, str]:
    """Digests of the files and folders that the config names, by the setting that names them."""
    found = {}
    for key, value in leaves(config):
        if not isinstance(value, str) or key.endswith("_target_") or key == "http.api_key_file":
            continue
        if (path := _input_path(key, value)) is not None:
            found[key] = _content(path)
    return found


def _input_path(key: str, value: str) -> Path | None:
    """The file or folder that a setting names; None where it names none."""
    if not value or "\0" in value or (key.rsplit(".", 1)[-1] not in INPUT_KEYS and "/" not in value):
        return None
    given = Path(value)
    candidates = [given, PROJECT_ROOT / given, PROJECT_ROOT / "experiments" / given]  # as the loader looks for it
    if key == "runner.profile":
        candidates.append(PROJECT_ROOT / "conf" / "profile" / f"{value}.yaml")
    for path in candidates:
        try:
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                return path
        except OSError:  # a name that no file system takes
            return None
    return None


def _content(path: Path) -> str:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    parts = []
    for file in files:
        state = file.stat()
        name = "" if file == path else file.relative_to(path).as_posix()
        parts.append([name, _file_digest(file, state.st_size, state.st_mtime_ns)])
    return digest(parts)


@functools.cache
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    return _hash([file.read_bytes()]) if size <= MOST_HASHED else f"{size} bytes of {mtime_ns}"


@functools.cache
def _strategy_files(targets: frozenset[str], root: Path) -> frozenset[tuple[str, str]]:
    """(name, digest) of the files behind `targets` that no shared package holds, and of what they import."""
    found: dict[Path, str] = {}
    waiting = [place for target in sorted(targets) if (place := _find(target, root)) is not None]
    while waiting:
        path, roots = waiting.pop()
        if path in found:
            continue
        found[path] = _name(path, roots)
        if not _is_shared(path, root) and not _is_foreign(path, root):
            waiting += [(file, roots) for file in _imports(path, roots) if not _is_foreign(file, root)]
    return frozenset((name, _hash([path.read_bytes()])) for path, name in found.items() if not _is_shared(path, root))


def _is_shared(path: Path, root: Path) -> bool:
    packages = (*SHARED_PACKAGES, REPORTS_PACKAGE)
    return path.is_relative_to(root) and path.relative_to(root).parts[0] in packages


def _is_foreign(path: Path, root: Path) -> bool:
    """Whether an installed package holds it: its own imports are no strategy's."""
    ours = path.is_relative_to(root) and path.relative_to(root).parts[0] in STRATEGY_PACKAGES
    return "site-packages" in path.parts and not ours


def _name(path: Path, roots: tuple[Path, ...]) -> str:
    """How the manifest calls a file: from the folder that its package lies in."""
    return next((path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)), path.name)


def _find(target: str, root: Path) -> tuple[Path, tuple[Path, ...]] | None:
    """The file that defines `target`, and the folders in which its imports are looked for; imports nothing."""
    # A user's `experiments.mine` is none of ours, though we have a package of that name.
    head = root / target.partition(".")[0] / "__init__.py"
    if (path := _module_file(target, root)) is not None and path != head:
        return path, (root,)
    try:
        spec = importlib.util.find_spec(target.partition(".")[0])
    except (ImportError, ValueError):
        return None  # instantiating it says so
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    home = Path(spec.origin).resolve().parent
    if spec.submodule_search_locations:
        home = home.parent
    path = _module_file(target, home)
    return None if path is None else (path, (root, home))


def _module_file(name: str, root: Path) -> Path | None:
    """The file of the module that a dotted name lies in: its longest prefix that is one."""
    parts = name.removeprefix(f"{PACKAGE}.").split(".")
    for count in range(len(parts), 0, -1):
        base = root.joinpath(*parts[:count])
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imports(path: Path, roots: tuple[Path, ...]) -> list[Path]:
    """The files below `roots` that a file's import statements name, wherever they stand in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # importing it says so
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = next((root for root in roots if path.is_relative_to(root)), path.parent)
                parents = path.relative_to(home).parts[: -node.level]
                base = ".".join([*parents, *filter(None, [base])])
            names |= {f"{base}.{alias.name}".strip(".") for alias in node.names}
    return [file for name in sorted(names) for root in roots for file in _with_parents(name, root)]


def _with_parents(name: str, root: Path) -> list[Path]:
    """A module's file and those of the packages around it, which run before it."""
    path = _module_file(name, root)
    if path is None:
        return []
    folders = [folder for folder in path.parents if folder.is_relative_to(root) and folder != root]
    return [path, *(init for folder in folders if (init := folder / "__init__.py").is_file())]


def _hash(parts: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()
