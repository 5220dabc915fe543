"""A run that finished nothing is an error with its reasons and what to do, wherever it ran."""

import json
import sys
from pathlib import Path

import pytest

from kvarena.experiments.entry import main
from kvarena.experiments.jobs.unserved import Unserved, why_unserved
from kvarena.experiments.studies.cells import CellRunner

ROOT = Path(__file__).resolve().parents[2]
LOAD = ["workload=fixed", "workload.num_requests=3", "workload.prompt_len=40", "workload.output_len=40",
        "runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "report.progress=false",
        "report.pages=false", "report.kv_map=false"]  # fmt: skip
KINDS = {
    "max_model_len": (["engine.max_model_len=64"], "engine.max_model_len=64"),
    "the pool": (["kv_cache.num_slots=64"], "that the empty KV pool can hold"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    def call(*args: str) -> tuple[int, list[str], dict]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *args, *LOAD])
        code = main()
        out, err = capfd.readouterr()
        return code, [line for line in err.splitlines() if line.startswith("error: ")], json.loads(out.splitlines()[-1])

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_rejects_everything(kind, run, tmp_path):
    override, reason = KINDS[kind]
    for _ in range(2):  # it is finished, and says so again
        code, [line], last = run(*override, f"hydra.run.dir={tmp_path}/run")
        assert code == 2
        assert line.startswith("error: paged x continuous finished none of 3 requests: 3 rejected (")
        assert reason in line
        assert "To serve any: make the workload's requests shorter, or raise engine.max_model_len" in line
        assert (last["num_rejected"], last["num_finished"]) == (3, 0)


def test_a_cell_of_a_sweep_that_serves_nothing_keeps_its_row_and_costs_the_exit_code(run, tmp_path):
    code, [line], last = run("-m", "kv_cache.num_slots=64,4096", f"hydra.sweep.dir={tmp_path}/D")
    assert code == 2
    assert "finished none of 3 requests" in line
    summary = json.loads(Path(last["summary"]).read_text())
    assert [cell["num_finished"] for cell in summary["cells"]] == [0, 3]
    assert last["failed"] == []
    assert [entry["name"] for entry in last["unserved"]] == ["kv_cache.num_slots=64"]
    [told], [kept] = last["unserved"], json.loads((tmp_path / "D" / "sweep.json").read_text())["unserved"]
    assert (told["folder"], last["num_unserved_cells"]) == (kept["folder"], 1)
    assert kept["error"].startswith(told["error"].removesuffix("..."))


def test_a_cell_of_an_experiment_that_serves_nothing_ends_it(tmp_path):
    with pytest.raises(Unserved, match=r"^small finished none of 3 requests: 3 rejected"):
        CellRunner([*LOAD, "kv_cache.num_slots=64"], tmp_path).run("small")


def test_every_kind_has_its_example_and_its_remedy():
    rejections = [
        {"count": 2, "finish_reason": "rejected", "example": "too\nlong"},
        {"count": 1, "finish_reason": "error", "example": "it broke"},
    ]
    counts = {"num_requests": 7, "num_finished": 0, "num_rejected": 2, "num_failed": 1, "num_aborted": 4}
    summary = {"name": "x", "rejections": rejections} | counts
    here = why_unserved(summary)
    assert here.startswith("x finished none of 7 requests: 2 rejected (too long), 1 failed (it broke), 4 aborted. To ")
    assert here.count("; ") == 2
    assert "look into the server's log" in why_unserved(summary | {"target": {"url": "http://x"}})
    assert why_unserved(summary | {"num_finished": 1}) is None
    unrecorded = why_unserved(summary | {"rejections": []})
    assert unrecorded.startswith("x finished none of 7 requests: 2 rejected, 1 failed, 4 aborted. To serve any: make")
    assert "was given no request" in why_unserved(summary | {"num_requests": 0})
