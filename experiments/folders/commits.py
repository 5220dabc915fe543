"""Which commit a result's sources are: for runs of a copy without git, whose manifests hold the sources' hash alone.

    kvarena report DIR --commit      # DIR: a run, a sweep or an experiment; in a checkout that has the commit

A commit's tree is written out and hashed as the run hashed its own (experiments/folders/sources.py). The commit whose
hash is that of every run is written into the manifests, and into study.json, with `found_by: sources`.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.sources import (
    PROJECT_ROOT,
    SHARED_PACKAGES,
    STRATEGY_PACKAGES,
    UNMEASURED,
    sources_of,
)
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import MANIFEST_FILE, STUDY_FILE
from kvarena.reports.reading.writing import write_text

MOST_COMMITS = 300


def write_commit(folder: Path, root: Path = PROJECT_ROOT) -> str:
    """Find the commit that the runs below `folder` ran, and write it into their files.

    Args:
        folder: holds a run, or runs below it.
        root: the checkout whose history is searched, from HEAD back.

    Returns:
        The commit.

    Raises:
        ConfigError: no run, no hash in one, no checkout, or no commit of the last MOST_COMMITS has all hashes.
        ReportError: a manifest is broken.
    """
    manifests = {path: read_json(path) for path in sorted(folder.rglob(MANIFEST_FILE))}
    if not manifests:
        raise ConfigError(f"{folder} holds no run; give the folder of a run, a sweep or an experiment")
    without = [path.parent for path, manifest in manifests.items() if not (manifest.get("sources") or {}).get("hash")]
    if without:
        raise ConfigError(f"{without[0]} holds no hash of its sources: it was measured before there was one")
    for number, commit in enumerate(_commits(root)):
        if number == MOST_COMMITS:
            break
        with tempfile.TemporaryDirectory() as tree:
            _write_tree(root, commit, Path(tree))
            if all(_hash_of(manifest, Path(tree)) == manifest["sources"]["hash"] for manifest in manifests.values()):
                _write(folder, manifests, commit)
                return commit
    raise ConfigError(
        f"no commit of the last {MOST_COMMITS} before HEAD of {root} has the sources that all runs of {folder} name; "
        "check out the branch that was measured"
    )


def _hash_of(manifest: dict[str, Any], tree: Path) -> str:
    config = {key: value for key, value in manifest["config"].items() if key not in UNMEASURED}
    found: str = sources_of(config, tree)["hash"]
    return found


def _write(folder: Path, manifests: dict[Path, dict[str, Any]], commit: str) -> None:
    found = {"commit": commit, "dirty": False, "found_by": "sources"}
    files = dict(manifests)
    if (study := folder / STUDY_FILE).exists():
        files[study] = read_json(study)
    for path, content in files.items():
        content["git"] = found
        write_text(path, json.dumps(content, indent=2) + "\n")


def _commits(root: Path) -> Iterator[str]:
    """Commits from HEAD back."""
    yield from _git(root, "rev-list", f"--max-count={MOST_COMMITS}", "HEAD").decode().split()


def _write_tree(root: Path, commit: str, folder: Path) -> None:
    """The packages that are hashed, as they are in `commit`; those that it has not are left out."""
    names = _git(root, "ls-tree", "--name-only", commit).decode().split()
    wanted = [name for name in (*SHARED_PACKAGES, *STRATEGY_PACKAGES) if name in names]
    if not wanted:
        return
    archive = _git(root, "archive", "--format=tar", commit, "--", *wanted)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def _git(root: Path, *args: str) -> bytes:
    """What git prints. Raises ConfigError."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, check=False)
    except OSError as error:
        raise ConfigError(f"git cannot be run ({error.strerror}), and it holds the commits") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ConfigError(f"{root} has no history to look for a commit in: {reason[0]}")
    return done.stdout
