"""A copy without git leaves the hash of its sources; a checkout says which commit that was."""

import json
import subprocess

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.commits import write_commit
from kvarena.experiments.folders.sources import sources_of

CONFIG = {"allocator": {"_target_": "allocators.mine.Mine"}, "engine": {"seed": 0}}


@pytest.fixture
def checkout(tmp_path):
    """Three commits of a project, and their ids; the first has no packages at all."""
    root = tmp_path / "checkout"
    (root / "allocators").mkdir(parents=True)
    ids = []

    def commit():
        for command in (("add", "-A"), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")):
            subprocess.run(["git", "-C", str(root), *command], check=True)
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        ids.append(done.stdout.strip())

    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "README.md").write_text("x\n")
    commit()
    for value in (1, 2):
        for package in ("engine", "experiments"):
            (root / package).mkdir(exist_ok=True)
            (root / package / "code.py").write_text(f"VALUE = {value}\n")
        (root / "allocators" / "mine.py").write_text("class Mine: pass\n")
        commit()
    return root, ids


def _run(folder, source, config=CONFIG):
    folder.mkdir(parents=True)
    manifest = {"config": config, "git": {"commit": None, "dirty": None}}
    if source is not None:
        manifest["sources"] = sources_of(config, source)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _copy_of(root, commit, target):
    target.mkdir()
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(target)], input=archive, check=True)
    return target


def test_the_commit_is_found_and_written_into_every_run_and_the_study(tmp_path, checkout):
    root, ids = checkout
    copy = _copy_of(root, ids[1], tmp_path / "copy")
    for name in ("a", "b"):
        _run(tmp_path / "study" / "cells" / name, copy)
    (tmp_path / "study" / "study.json").write_text(json.dumps({"git": {"commit": None}, "title": "t"}))
    assert write_commit(tmp_path / "study", root) == ids[1]
    for file in (tmp_path / "study" / "study.json", tmp_path / "study" / "cells" / "a" / "manifest.json"):
        assert json.loads(file.read_text())["git"] == {"commit": ids[1], "dirty": False, "found_by": "sources"}


def test_code_that_no_commit_has_is_said(tmp_path, checkout):
    root, ids = checkout
    copy = _copy_of(root, ids[2], tmp_path / "copy")
    (copy / "engine" / "new.py").write_text("VALUE = 3\n")
    _run(tmp_path / "run", copy)
    with pytest.raises(ConfigError, match="no commit of the last"):
        write_commit(tmp_path / "run", root)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["git"]["commit"] is None


def test_runs_of_two_commits_are_none(tmp_path, checkout):
    root, ids = checkout
    for commit in ids[1:]:
        _run(tmp_path / "sweep" / commit, _copy_of(root, commit, tmp_path / commit))
    with pytest.raises(ConfigError, match="no commit of the last"):
        write_commit(tmp_path / "sweep", root)


def test_what_cannot_be_found_out_is_one_line(tmp_path, checkout):
    root, _ = checkout
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        write_commit(tmp_path / "empty", root)
    _run(tmp_path / "old", None)
    with pytest.raises(ConfigError, match="measured before there was one"):
        write_commit(tmp_path / "old", root)
    _run(tmp_path / "run", root)
    (tmp_path / "no").mkdir()
    with pytest.raises(ConfigError, match="no history to look for a commit in"):
        write_commit(tmp_path / "run", tmp_path / "no")
