"""The recording for the calibration, tried out on a CPU: its files become run folders that replay step for step."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from experiments.gpu import claims, record
from experiments.simulation.recorded import RecordedRun
from experiments.simulation.replay import replay
from reports.run_report import write_run_report

OPTIONS = record.Options("chunked", num_slots=4096, max_num_seqs=8, seconds=0.1, device="cpu", min_requests=3)


def test_every_cell_becomes_a_run_folder_that_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "PROBE_REQUESTS", 2)
    monkeypatch.setattr(record, "MAX_REQUESTS", 4)
    monkeypatch.setattr(record, "MAX_OUTPUT_LEN", 16)
    record.measure(tmp_path, ["tiny"], OPTIONS._replace(seeds=(1,)), limit=60.0)
    assert len(list(tmp_path.glob("*.json.gz"))) == 2
    made = record.folders(tmp_path, "0" * 40)
    assert len(made) == 6
    for folder in made:
        run = RecordedRun.read(folder)
        assert run.manifest["git"]["commit"] is not None
        assert run.overlap is ("overlap" in folder.name)
        assert {row["num_output_tokens"] - row["max_tokens"] for row in run.requests} == {0}
        assert replay(run).identical
    write_run_report(made[0])


def test_kept_cells_of_the_founding_claim_still_make_their_report(tmp_path: Path):
    kept = Path(__file__).parents[2] / "docs/results/h200-claim"
    for name in ("pagedxcontinuous", "contiguousxstatic"):
        shutil.copy(kept / f"{name}.json.gz", tmp_path)
    claims.report(tmp_path, "0" * 40)
    text = (tmp_path / "report.md").read_text()
    assert "paged × continuous is the fastest of 2 cells with 3,894 output tokens/s" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_they_say_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        claims.measure(tmp_path, "tiny", 1, 64, "cuda")
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        record.measure(tmp_path, ["tiny"], OPTIONS._replace(device="cuda"), limit=60.0)


def test_no_cell_starts_after_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(record, "PROBE_REQUESTS", 2)
    monkeypatch.setattr(record, "MAX_OUTPUT_LEN", 4)
    record.measure(tmp_path, ["tiny"], OPTIONS, limit=0.0)
    assert capsys.readouterr().out.count('"skipped"') == 12
    assert record.folders(tmp_path, None) == []


def test_the_warm_up_has_every_step_that_no_graph_serves():
    cell = record.warm_up_cell(OPTIONS, num_parameters=8_000_000_000)
    assert [req.num_prompt_tokens for req in cell.requests] == list(range(376, 2048))
    assert cell.strategy.scheduler_options["max_num_seqs"] == 1
    assert record.warm_up_cell(OPTIONS, num_parameters=600_000_000) is None


def test_one_loop_and_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(record, "PROBE_REQUESTS", 2)
    monkeypatch.setattr(record, "MAX_OUTPUT_LEN", 4)
    options = OPTIONS._replace(loops=("overlap",), seeds=(5, 7))
    record.measure(tmp_path, ["tiny"], options, limit=60.0)
    assert [path.name for path in tmp_path.glob("*.gz")] == ["tiny-overlap.json.gz"]
    made = [folder.name for folder in record.folders(tmp_path, None)]
    assert made == [f"tiny-overlap-{load}-seed{seed}" for load in record.LOADS for seed in (5, 7)]
