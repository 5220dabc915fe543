"""The hash of the code that ran: by content, of what a cell uses, in any kind of installation."""

import shutil
from pathlib import Path

import pytest

from kvarena.experiments.folders.sources import PROJECT_ROOT, code_hash, inputs_of, package_digest, sources_of

MINE = """from kvarena.allocators.blocks import BlockPool
from allocators.mine_parts import helper
class Mine(BlockPool): ...
"""
PAGED = {
    "allocator": {"_target_": "kvarena.allocators.paged.PagedAllocator"},
    "scheduler": {"_target_": "kvarena.schedulers.sjf.X"},
}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the packages without git, as a wheel's installation is."""
    for name in ("engine", "experiments", "allocators", "schedulers", "routers", "reports"):
        shutil.copytree(PROJECT_ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.css"))
    return tmp_path


def files(config, root=PROJECT_ROOT):
    package_digest.cache_clear()
    return sources_of(config, root)


def write(path: Path, text: str) -> None:
    from kvarena.experiments.folders import sources

    path.write_text(text)
    sources._strategy_files.cache_clear()
    package_digest.cache_clear()


def test_a_wheel_and_a_checkout_of_the_same_code_have_the_same_hash(checkout):
    assert files(PAGED, checkout) == files(PAGED)
    assert code_hash(checkout) == code_hash()


def test_a_strategy_counts_for_the_cells_that_use_it(checkout):
    mine = {"allocator": {"_target_": "allocators.mine.Mine"}, "scheduler": {"_target_": "kvarena.schedulers.sjf.X"}}
    write(checkout / "allocators/mine_parts.py", "helper = 1\n")
    write(checkout / "allocators/mine.py", MINE)
    paged, before = files(PAGED, checkout), files(mine, checkout)
    assert paged == files(PAGED)  # a new file that it does not import
    assert {"allocators/mine.py", "allocators/mine_parts.py", "allocators/blocks.py"} <= set(before["strategy"])
    assert "allocators/paged.py" not in before["strategy"]
    write(checkout / "allocators/mine_parts.py", "helper = 2\n")
    after = files(mine, checkout)
    assert after["hash"] != before["hash"]
    assert files(PAGED, checkout) == paged
    write(checkout / "engine/core.py", "")
    assert files(PAGED, checkout)["hash"] != paged["hash"]
    assert files(mine, checkout)["hash"] != after["hash"]


def test_reports_change_no_measurement(checkout):
    before = files(PAGED, checkout)["hash"]
    write(checkout / "reports/drawing/format.py", "")
    assert files(PAGED, checkout)["hash"] == before


def test_a_class_outside_the_checkout_counts_with_what_lies_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "far_away"
    package.mkdir()
    write(package / "__init__.py", "")
    write(package / "parts.py", "x = 1\n")
    write(package / "policy.py", "from kvarena.schedulers.chunked import ChunkedScheduler\nfrom . import parts\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"scheduler": {"_target_": "far_away.policy.Policy"}}
    before = files(config)
    assert {"far_away/policy.py", "far_away/parts.py", "schedulers/chunked.py"} <= set(before["strategy"])
    write(package / "parts.py", "x = 2\n")
    assert files(config)["hash"] != before["hash"]


def test_what_cannot_be_found_or_read_is_left_to_whoever_imports_it(tmp_path, monkeypatch):
    write(tmp_path / "broken_policy.py", "def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = files({"a": {"_target_": "no.such.thing"}, "b": [{"_target_": "broken_policy.X"}]})
    assert list(found["strategy"]) == ["broken_policy.py"]


def test_files_that_the_config_names_count_by_content(tmp_path):
    trace, folder = tmp_path / "trace.csv", tmp_path / "model"
    folder.mkdir()
    trace.write_text("a")
    (folder / "weights").write_text("1")
    key = tmp_path / "key"
    key.write_text("secret")
    config = {"workload": {"path": str(trace)}, "model": {"path": str(folder), "name": "a/b"},
              "http": {"api_key_file": str(key)}, "runner": {"profile": "h100"}}  # fmt: skip
    before = inputs_of(config)
    assert set(before) == {"workload.path", "model.path", "runner.profile"}
    (folder / "weights").write_text("2")
    after = inputs_of(config)
    assert [name for name in before if before[name] != after[name]] == ["model.path"]
