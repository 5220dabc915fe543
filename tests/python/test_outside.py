"""Strategies from outside the checkout: by entry point, and from a folder on hydra.searchpath."""

import sys

import pytest

import kvarena
from kvarena.experiments.entry import main
from kvarena.experiments.settings import outside

MODULE = """
from kvarena.allocators.paged import PagedAllocator
from kvarena.schedulers.continuous import ContinuousScheduler

class TheirAllocator(PagedAllocator):
    def __init__(self, *, thrift: float = 0.5, **options):
        super().__init__(**options)
        self.thrift = thrift

class TheirScheduler(ContinuousScheduler):
    pass
"""
COMMAND = ("runner=simulated", "model=qwen3-0.6b-shape", "engine.dtype=bfloat16", "workload.num_requests=3",
           "report.pages=false", "report.progress=false")  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package: a module, and what `pip` writes of its entry points."""

    def install(entry_points: str, module: str = MODULE, name: str = "their_strategies") -> None:
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(module)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(site)
        outside.installed.cache_clear()

    yield install
    outside.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("their_")]:
        del sys.modules[name]


def test_an_installed_strategy_is_a_choice_like_any_other(package, simulated, monkeypatch, capsys):
    package(
        "[kvarena.allocators]\ntheirs = their_strategies:TheirAllocator\n"
        "[kvarena.schedulers]\ntheir-own = their_strategies:TheirScheduler\n"
    )
    result = kvarena.run("theirs", "their-own", **simulated | {"allocator.thrift": 0.25})
    assert result.name == "theirs x their-own"
    assert result.manifest["config"]["allocator"]["_target_"] == "their_strategies.TheirAllocator"
    assert result.manifest["strategy"]["details"]["thrift"] == 0.25
    assert "their_strategies.py" in result.manifest["sources"]["strategy"]
    argv = ["run.py", "-m", "allocator=paged,theirs", *COMMAND, "hydra.sweep.dir=swept"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 0, capsys.readouterr().err
    assert list(kvarena.load("swept").runs["allocator"]) == ["paged", "theirs"]


@pytest.mark.parametrize(
    ("entry_points", "module", "line"),
    [
        (
            "theirs = their_strategies:Gone",
            MODULE,
            "their_strategies:Gone of their_strategies cannot be imported: Attr",
        ),
        ("theirs = their_strategies:X", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("theirs = their_strategies:X\npaged = their_strategies:Y", MODULE, "registers a second allocator 'paged'"),
    ],
)
def test_a_package_that_is_wrong_is_a_line(package, simulated, monkeypatch, capsys, entry_points, module, line):
    package(f"[kvarena.allocators]\n{entry_points}\n", module)
    with pytest.raises(kvarena.KvarenaError, match=line):
        kvarena.run("theirs", **simulated)
    monkeypatch.setattr(sys, "argv", ["run.py", "allocator=theirs", *COMMAND])
    assert main() == 2
    said = capsys.readouterr().err
    assert line.split(" cannot")[0] in said and said.count("\n") == 1


def test_a_package_is_only_imported_where_it_is_chosen(package, simulated):
    package("[kvarena.allocators]\ntheirs = their_strategies:X\n", "1 / 0")
    assert kvarena.run(**simulated).summary.num_finished == 5


def test_a_folder_on_the_search_path_adds_choices(package, simulated, tmp_path):
    package("")
    (tmp_path / "conf" / "allocator").mkdir(parents=True)
    text = "_target_: their_strategies.TheirAllocator\nblock_size: 8\nthrift: 1.0\n"
    (tmp_path / "conf" / "allocator" / "thrifty.yaml").write_text(text)
    result = kvarena.run("thrifty", overrides=[f"hydra.searchpath=[file://{tmp_path}/conf]"], **simulated)
    assert result.name == "thrifty x continuous" and result.manifest["pool"]["block_size"] == 8
