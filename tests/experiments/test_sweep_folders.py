"""A sweep's folder: cells under their own names, a grid that grows, rounds, other code beside the old."""

import json
import shlex
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import warm
from hydra.core.override_parser.overrides_parser import OverridesParser

from kvarena.experiments.building import build
from kvarena.experiments.entry import main
from kvarena.experiments.folders import cell_folders
from kvarena.experiments.folders.cell_folders import CellFolders, stem_of
from kvarena.experiments.folders.cell_state import cell_key, mark_finished
from kvarena.experiments.folders.sources import digest
from kvarena.experiments.settings.compose import compose_cell

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = ["runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16"]
SMALL = ["workload=fixed", "workload.num_requests=3", "workload.prompt_len=8", "workload.output_len=4",
         "report.progress=false", "report.pages=false", "report.kv_map=false"]  # fmt: skip
KEY = {"config": "c", "code": "a", "machine": "m", "round": None, "reports": "r"}


COMPUTED = ["driver.probe=false", "engine.device=cpu"]


class NoFigures(dict):
    """They take longer than the cells."""

    def __missing__(self, name: str) -> str:
        return "<svg/>"


class Swept:
    def __init__(self, code: int, folder: Path, out: str, err: str) -> None:
        self.code, self.folder, self.out, self.err = code, folder, out, err
        last = (out.strip().splitlines() or [""])[-1]
        self.last = json.loads(last) if last.startswith("{") else None
        self.record = json.loads((folder / "sweep.json").read_text())
        self.runs = self.record["runs"]


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    def call(*args: str, folder: str = "D", options: list[str] = SIMULATED) -> Swept:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr("kvarena.reports.pages.comparison.draw_comparison", lambda *_: NoFigures())
        path = tmp_path / folder
        command = ["-m", *options, *SMALL, *args, f"hydra.sweep.dir='{path}'"]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *command])
        code = main()
        return Swept(code, path, *capfd.readouterr())

    return call


def test_a_grid_is_extended_by_what_is_missing(sweep):
    first = sweep("allocator=paged", "scheduler=continuous,static", folder="a folder with spaces")
    more = sweep("allocator=paged", "scheduler=continuous,static,chunked", folder="a folder with spaces")
    assert (first.code, more.code) == (0, 0)
    assert more.err.count("finished before") == 2
    assert more.runs[:2] == first.runs
    assert [name.rpartition("-")[0] for name in more.runs] == ["paged-continuous", "paged-static", "paged-chunked"]
    # The pages' commands: the sweep's own words, and for a cell what composes it without the sweep.
    assert more.record["command"][:4] == ["python", "run.py", "-m", SIMULATED[0]]
    assert "scheduler=continuous,static,chunked" in more.record["command"]
    assert more.record["command"][-1] == f"hydra.sweep.dir='{more.folder}'"
    for name in more.runs:
        command = json.loads((more.folder / name / "manifest.json").read_text())["command"]
        assert command[:2] == ["python", "run.py"] and not any("sweep" in word for word in command)
        key = json.loads((more.folder / name / "cell.json").read_text())
        assert cell_key(*compose_cell(command[2:]))["config"] == key["config"]
    for name in more.runs:
        assert shlex.quote(name) == name
        [parsed] = OverridesParser.create().parse_overrides([f"report.baseline={name}"])
        assert parsed.value() == name


def test_another_sweep_adds_its_cells_and_lists_only_those(sweep):
    first = sweep("scheduler=continuous,static")
    other = sweep("scheduler=continuous,static", "workload.output_len=5,6", "sampling.temperature=1e-3")
    assert other.code == 0
    assert "finished before" not in other.err
    assert len(other.runs) == 4
    assert not set(other.runs) & set(first.runs)
    assert {path.parent.name for path in other.folder.glob("*/cell.json")} == {*first.runs, *other.runs}


def test_a_cell_that_failed_and_works_now_is_clean(sweep, monkeypatch):
    failing = sweep("scheduler=continuous,static", "runner.profile=nowhere,h100")
    assert failing.code == 2
    assert [entry["name"] for entry in failing.record["failed"]] == [
        "runner.profile=nowhere, scheduler=continuous", "runner.profile=nowhere, scheduler=static"
    ]  # fmt: skip
    [left] = {entry["folder"] for entry in failing.record["failed"] if "static" in entry["name"]}
    assert (failing.folder / left / "error.json").exists()
    profile = (ROOT / "conf/profile/h100.yaml").read_text()
    Path("nowhere.yaml").write_text(profile)
    again = sweep("scheduler=static", "runner.profile=nowhere.yaml,h100")
    assert (again.code, again.record["failed"]) == (0, [])
    assert again.err.count("finished before") == 1


def test_a_failed_cell_that_is_run_again_leaves_no_error(sweep, monkeypatch):
    import kvarena.experiments.jobs.job

    def broken(*_):
        raise kvarena.experiments.jobs.job.ConfigError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(kvarena.experiments.jobs.job, "run_engine", broken)
        first = sweep("scheduler=continuous,static")
    assert [entry["error"] for entry in first.record["failed"]] == ["not today"] * 2
    again = sweep("scheduler=continuous,static")
    assert (again.code, again.record["failed"], len(again.runs)) == (0, [], 2)
    assert not list(again.folder.glob("*/error.json"))
    assert {entry["folder"] for entry in first.record["failed"]} == set(again.runs)


def test_rounds_run_every_cell_once_each_in_changing_order_with_seeds_outermost(sweep):
    options = ["driver.warmup=false", "driver.probe=false"]
    done = sweep("scheduler=continuous,static", "workload.seed=0,1", "sweep.rounds=2", options=options)
    assert done.code == 0
    assert done.record["rounds"] == 2
    assert [name[-3:] for name in done.runs] == ["-r0", "-r1"] * 4
    manifests = {name: json.loads((done.folder / name / "manifest.json").read_text()) for name in done.runs}
    assert Counter(one["round"] for one in manifests.values()) == {0: 4, 1: 4}
    ran = sorted(manifests.values(), key=lambda one: one["run"]["ended"])
    blocks = [ran[start : start + 2] for start in range(0, 8, 2)]
    places = [{(one["config"]["workload"]["seed"], one["round"]) for one in block} for block in blocks]
    assert places == [{(0, 0)}, {(0, 1)}, {(1, 0)}, {(1, 1)}]
    orders = {tuple(one["strategy"]["scheduler"] for one in block) for block in blocks}
    assert len(orders) > 1
    assert all(sorted(names) == ["continuous", "static"] for names in orders)
    more = sweep("scheduler=continuous,static", "workload.seed=0,1", "sweep.rounds=3", options=options)
    assert more.err.count("finished before") == 8
    assert len(more.runs) == 12


def test_seeds_are_outermost_without_rounds_too(sweep):
    done = sweep("scheduler=continuous,static", "workload.seed=0,1,2")
    created = {path.name: (path / "cell.json").stat().st_mtime_ns for path in done.folder.glob("paged-*")}
    seeds = [json.loads((done.folder / name / "manifest.json").read_text())["config"]["workload"]["seed"]
             for name in sorted(created, key=created.get)]  # fmt: skip
    assert seeds == [0, 0, 1, 1, 2, 2]
    assert json.loads((done.folder / done.runs[0] / "manifest.json").read_text())["round"] is None


def test_rounds_of_simulated_cells_are_one(sweep):
    done = sweep("scheduler=continuous,static", "sweep.rounds=5")
    assert done.code == 0
    assert done.err.count("sweep.rounds=5: simulated cells run once") == 1
    assert len(done.runs) == 2


def test_each_cell_says_its_place_and_one_table_ends_the_sweep(sweep):
    """Every cell printed a table and 7 kB of JSON, and a log got bars of carriage returns."""
    done = sweep("scheduler=static,fair", "workload.seed=0,1", "kv_cache.num_slots=1,512", "report.progress=true")
    assert done.code == 2
    places = [line for line in done.err.splitlines() if line.startswith("[")]
    began = [line for line in places if "failed: " not in line]
    assert [line.partition(" ")[0] for line in began] == [f"[{place}/8]" for place in range(1, 9)]
    assert all(" scheduler=" in line and " kv_cache.num_slots=" in line and " workload.seed=" in line for line in began)
    assert "workload.seed=0" in began[0] and "workload.seed=1" in began[-1]  # seeds are outermost
    assert len(places) - len(began) == 4 == len(done.record["failed"])
    assert done.err.count("3 of 3 requests") == 4
    assert "\r" not in done.out + done.err
    assert sum(line.startswith("{") for line in done.out.splitlines()) == 1
    assert done.out.count("TTFT") == 1
    assert (done.last["num_cells"], done.last["num_failed_cells"]) == (2, 4)


def test_a_grid_that_names_a_cell_twice_has_it_once(sweep):
    done = sweep("scheduler=static,static,continuous")
    assert [name.rpartition("-")[0] for name in done.runs] == ["paged-static", "paged-continuous"]


def test_a_baseline_is_named_without_digits(sweep):
    for baseline in ("paged-static", "scheduler=static", "paged x static"):  # the cells run once
        done = sweep("scheduler=continuous,static", f"report.baseline='{baseline}'")
        assert done.code == 0, done.err
        summary = done.folder / "summary.json"
        assert json.loads(summary.read_text())["baseline"] == "paged × static"
        summary.unlink()


def test_other_code_gets_a_folder_of_its_own(sweep, monkeypatch):
    """Old results were taken for those of new code, or the sweep was refused."""
    from kvarena.experiments.folders import cell_state

    first = sweep("scheduler=continuous,static")
    found = cell_state.sources_of
    monkeypatch.setattr(cell_state, "sources_of", lambda config: found(config) | {"hash": "other"})
    second = sweep("scheduler=continuous,static")
    assert second.code == 0
    assert "finished before" not in second.err
    assert not set(first.runs) & set(second.runs)
    third = sweep("scheduler=continuous,static", "sweep.allow_mixed=true")
    assert third.err.count("finished before") == 2
    monkeypatch.setattr(cell_state, "sources_of", lambda config: found(config) | {"hash": "newest"})
    newest = sweep("scheduler=continuous,static", "sweep.allow_mixed=true")
    assert newest.err.count("finished before with other code (kept by sweep.allow_mixed), in ") == 2
    assert newest.runs == second.runs  # of two results the newer one, whatever the folders are called
    assert "with other code" not in third.err
    monkeypatch.undo()
    assert sweep("scheduler=continuous,static").runs == first.runs


def test_an_edited_strategy_runs_again_and_the_others_do_not(tmp_path):
    """A new file that git does not know, outside the checkout, is code like any other."""
    mine = "from kvarena.allocators.paged import PagedAllocator\nclass Mine(PagedAllocator):\n    x = 0\n"
    (tmp_path / "mine.py").write_text(mine)
    command = [str(ROOT / "run.py"), "-m", "scheduler=continuous,static", *SIMULATED, *SMALL,
               "allocator._target_=kvarena.allocators.paged.PagedAllocator,mine.Mine",
               f"hydra.sweep.dir={tmp_path}/D"]  # fmt: skip

    def run() -> tuple[list[str], int]:
        done = warm.run(command, tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "D" / "sweep.json").read_text())["runs"], done.stderr.count("finished before")

    first, _ = run()
    assert run() == (first, 4)
    (tmp_path / "mine.py").write_text(
        "from kvarena.allocators.paged import PagedAllocator\nclass Mine(PagedAllocator): x = 1\n"
    )
    second, num_before = run()
    assert num_before == 2
    assert [old == new for old, new in zip(first, second, strict=True)] == [True, False, True, False]
    manifest = json.loads((tmp_path / "D" / second[1] / "manifest.json").read_text())
    assert "mine.py" in manifest["sources"]["strategy"]


def test_names_are_plain_whatever_the_settings():
    settings = {
        "workload.seed": "1",
        "arrival.rate": "1e-3",
        "workload.path": "/a/b.csv",
        "x.y": "{a:1}",
        "engine.note": "a=b,c",
        "+z.w": "-2",
        "long.one": "v" * 300,
        "quoted": "'it is'",
    }
    assert stem_of(["paged", "static"], settings) == "paged-static-seed1-rate1e-3-w-2"
    assert stem_of(["paged"], {"scheduler.max_num_batched_tokens": "2048"}) == "paged-max_num_batched_tokens2048"
    assert stem_of(["my/own strategy", "a=b"], {}) == "my_own_strategy-a_b"
    assert len(stem_of(["p" * 500], {f"k{number}": "v" for number in range(100)})) <= 80


def test_digits_that_are_taken_are_made_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cell_folders, "digest", lambda value: digest(value) if len(value) == 4 else "3f9c" + digest(value)
    )
    folders = CellFolders(tmp_path)
    first = folders.claim("paged-static", KEY)
    second = folders.claim("paged-static", KEY | {"config": "d"})
    assert first.name == "paged-static-3f9c"
    assert second.name.startswith("paged-static-3f9c")
    assert len(second.name) == len(first.name) + 2
    again = CellFolders(tmp_path)
    assert again.claim("another stem", KEY) == first  # the names of settings may change from sweep to sweep
    assert again.claim("paged-static", KEY | {"config": "d"}) == second


def test_two_hundred_cells_have_two_hundred_folders(tmp_path):
    keys = [KEY | {"config": str(number), "round": repeat} for number in range(100) for repeat in (0, 1)]
    folders = CellFolders(tmp_path)
    names = {folders.claim("paged-static", key) for key in keys}
    assert len(names) == 200
    again = CellFolders(tmp_path)
    assert {again.claim("paged-static", key) for key in keys} == names


def test_a_result_without_an_owner_is_left_alone(tmp_path):
    """As folders of earlier versions are."""
    (tmp_path / "cells").mkdir()
    mark_finished(tmp_path / "cells", KEY)
    assert CellFolders(tmp_path).claim("cells", KEY | {"code": "b"}, plain=True).name.startswith("cells-")


def test_another_trace_under_the_same_name_is_another_cell(tmp_path):
    from kvarena.experiments.settings.compose import compose_cell

    profile = tmp_path / "card.yaml"
    profile.write_text((ROOT / "conf/profile/h100.yaml").read_text())
    overrides = ["runner=simulated", f"runner.profile={profile}"]
    before = cell_key(*compose_cell(overrides))
    profile.write_text(profile.read_text() + "\n")
    after = cell_key(*compose_cell(overrides))
    assert before["config"] != after["config"]
    assert before["code"] == after["code"]


def test_a_sweep_that_recorded_nothing_is_no_error(sweep):
    """It ended with 2 and without its last line, though every cell had done what the command asked."""
    done = sweep("scheduler=continuous,static", "driver.record=none")
    assert done.code == 0
    assert "no comparison: no run recorded anything (driver.record=none)" in done.err
    assert done.last["runs"] == done.runs
    assert len(done.runs) == 2


@pytest.mark.collected
def test_cells_of_a_sweep_share_model_and_runner_while_these_are_alike(sweep, monkeypatch):
    """A GPU's graphs are captured once for them; a cell of another pool has a runner of its own, on the same model."""
    models, made = [], []
    load, prepare = build.load, build._prepare_runner

    def loading(*args):
        model = load(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(build, "load", loading)
    monkeypatch.setattr(build, "_prepare_runner", lambda *args: made.append(1) or prepare(*args))
    ran = sweep("scheduler=continuous,static", "kv_cache.num_blocks=64,128", options=["model=demo", *COMPUTED])
    assert ran.code == 0 and len(ran.runs) == 4
    assert len(models) == 1 and models[0]() is None, "what cells share goes with the sweep"
    assert len(made) < 4
