"""Optuna's search finds a known optimum, judges it on fresh seeds, goes on after a break, and says what is wrong."""

import csv

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.experiments.studies.claims import Verdict
from kvarena.experiments.studies.search import TRIALS_FILE, SearchStudy

OPTIONS = {
    "space": [{"key": "a", "low": 1, "high": 100, "log": True}, {"key": "b", "choices": ["x", "y"]}],
    "objective": "deep.value", "direction": "maximize", "num_trials": 60, "seeds": [0, 1], "confirm_seeds": [2, 3, 4],
    "sampler_seed": 0,
}  # fmt: skip


class KnownCells:
    """Cells whose objective is known: best at a=20, b=y; b=y does not run with a below 3. Noise by seed alone."""

    def __init__(self, out_dir, gain=1.0):
        self.out_dir, self.gain, self.folders, self.asked = out_dir, gain, [], []

    def run(self, name, overrides=()):
        self.folders.append(self.out_dir / name)
        self.asked.append((name, list(overrides)))
        given = dict(one.split("=") for one in overrides)
        a, b, seed = int(given.get("a", 20)), given.get("b", "x"), int(given["workload.seed"])
        if b == "y" and a < 3:
            raise NotDefined("a and b mean nothing together")
        return {"deep": {"value": 100 - abs(a - 20) + self.gain * 10 * (b == "y") + seed}}


def test_a_known_optimum_is_found_and_confirmed_on_fresh_seeds(tmp_path):
    cells = KnownCells(tmp_path)
    findings = SearchStudy(**OPTIONS).run(cells)
    best, own, ratio = findings.claims
    assert "b=y. On fresh seeds that is" in findings.headline and findings.headline.endswith("higher.")
    assert own.ours == pytest.approx(103)  # a=20, b=x over seeds 2, 3, 4
    assert best.ours > 110
    assert ratio.verdict is Verdict.HIGHER
    assert ratio.low > 1
    assert {name.rpartition("seed")[2] for name, _ in cells.asked if name.startswith(("best", "default"))} == {
        "2",
        "3",
        "4",
    }
    rows = list(csv.DictReader((tmp_path / TRIALS_FILE).open()))
    assert len(rows) == 60
    failed = [row for row in rows if row["error"]]
    assert all(row["b"] == "y" and int(row["a"]) < 3 and not row["deep.value"] for row in failed)
    trials, importance = findings.charts
    assert list(trials.series[1].y) == sorted(trials.series[1].y)
    assert sum(importance.series[0].y) == pytest.approx(100)


def test_a_gain_that_is_not_there_is_not_found(tmp_path):
    """Of settings that change nothing, one is always the best trial; on fresh seeds it is no better."""
    cells = KnownCells(tmp_path, gain=0.0)
    options = OPTIONS | {"space": [{"key": "b", "choices": ["x", "y"]}], "num_trials": 4}
    findings = SearchStudy(**options).run(cells)
    assert findings.claims[2].verdict is Verdict.SAME
    assert "no significant difference" in findings.headline


def test_the_same_seed_asks_the_same(tmp_path):
    first, second = KnownCells(tmp_path), KnownCells(tmp_path)
    options = OPTIONS | {"num_trials": 15, "direction": "minimize"}
    SearchStudy(**options).run(first)
    SearchStudy(**options).run(second)
    assert first.asked == second.asked


def test_groups_come_before_their_options(tmp_path):
    overrides = SearchStudy._overrides({"scheduler.max_num_seqs": 4, "scheduler": "chunked"})
    assert overrides == ["scheduler=chunked", "scheduler.max_num_seqs=4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": [{"key": "a"}]}, "study.space: a needs either choices or low and high"),
        ({"space": [{"key": "a", "low": 3, "high": 1}]}, "study.space: a needs low=3 below high=1"),
        ({"space": [{"key": "a", "low": 0, "high": 1, "log": True}]}, "above 0 where log is set"),
        ({"space": [{"key": "a", "lowest": 0}]}, "study.space: got an unexpected keyword argument 'lowest'"),
        ({"space": []}, "study.space must hold at least one setting"),
        ({"direction": "up"}, "study.direction=up must be one of maximize, minimize"),
        ({"num_trials": 0}, "study.num_trials=0 must be an integer of at least 1"),
        ({"confirm_seeds": [1]}, "none twice"),
        ({"objective": "deep.none"}, "study.objective=deep.none is no number of the cell"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        SearchStudy(**OPTIONS | change).run(KnownCells(tmp_path))


def test_it_searches_real_cells(tmp_path):
    findings, cells = run_study(
        tmp_path, "experiment=search", "study.num_trials=2", "study.seeds=[0]", "study.confirm_seeds=[7]",
        "workload.num_requests=20", "study.space=[{key:allocator.block_size,choices:[16,64]}]",
        "study.objective=ttft_seconds.p99", "study.direction=minimize",
    )  # fmt: skip
    assert [folder.name for folder in cells.folders] == [
        "trial-000-seed0",
        "trial-001-seed0",
        "best-seed7",
        "default-seed7",
    ]
    assert findings.claims[0].ours > 0
    assert findings.claims[2].verdict is Verdict.MEASURED  # one seed has no interval
