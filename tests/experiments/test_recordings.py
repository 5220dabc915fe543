"""The recording for the calibration, tried out on a CPU: its files become run folders that replay step for step."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kvarena.engine.errors import ConfigError
from kvarena.experiments.gpu import calibration_cells, record
from kvarena.experiments.gpu.calibration_cells import CELLS, FIT, HELD_OUT, LENGTHS
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.recordings import keep, make_folders, recording_names
from kvarena.experiments.simulation.replay import replay
from kvarena.reports.pages.run_report import write_run_report

OPTIONS = record.Options(["tiny"], num_slots=16384, device="cpu", share=0.003, limit=600.0)
# A load that refers to another cell, a pool of its own, and the loop without overlap.
NAMES = [
    "continuous8192-sharegpt-once",
    "chunked512-sharegpt-load0.3",
    "contiguous-fair1024-even-once",
    "sjf1024-mid-once-plain",
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recordings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "CELLS", tuple(cell for cell in CELLS if cell.name in NAMES))
        record.measure(out, OPTIONS)
    return out


def test_every_cell_becomes_a_run_folder_that_replays(recordings: Path, tmp_path: Path):
    made = make_folders(recordings, tmp_path)
    assert [folder.name for folder in made] == [f"tiny-{name}" for name in NAMES]
    for folder in made:
        run = RecordedRun.read(folder)
        assert run.overlap is not folder.name.endswith("plain")
        assert run.manifest["calibration"]["part"] in (FIT, HELD_OUT)
        assert {row["num_output_tokens"] - row["max_tokens"] for row in run.requests} == {0}
        assert len({row["client_id"] for row in run.requests}) > 1
        assert replay(run).identical
    cut = RecordedRun.read(made[2]).manifest["pool"]
    assert cut["num_slots"] == OPTIONS.num_slots  # of the 98,304 that it may use, what the pool has
    write_run_report(made[0])


def test_a_kept_recording_is_the_same_and_names_its_commit(recordings: Path, tmp_path: Path):
    keep(recordings, tmp_path / "kept", "0" * 40)
    first, second = make_folders(recordings, tmp_path / "a"), make_folders(tmp_path / "kept", tmp_path / "b")
    for old, new in zip(first, second, strict=True):
        for name in ("requests.parquet", "steps.parquet"):
            assert pq.read_table(old / name).equals(pq.read_table(new / name))
        assert json.loads((new / "manifest.json").read_text())["git"] == {"commit": "0" * 40, "dirty": False}
    steps = pq.read_table(first[0] / "steps.parquet").to_pandas()
    assert (np.diff(steps["start_time"]) > 0).all()
    assert (steps["longest_prefill"] > 0).equals(steps["num_prefill_requests"] > 0)


def test_no_cell_starts_after_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record.measure(tmp_path, OPTIONS._replace(limit=0.0))
    assert capsys.readouterr().out.count('"skipped"') == len(CELLS)
    with pytest.raises(ConfigError, match="holds no recordings"):
        recording_names(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        record.measure(tmp_path, OPTIONS._replace(device="cuda"))


def test_a_file_that_is_no_recording_is_one_line(recordings: Path, tmp_path: Path):
    (tmp_path / "tiny-requests.parquet").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a recording"):
        make_folders(tmp_path, tmp_path / "runs")


def test_held_out_cells_share_nothing_with_fitted_ones():
    """Neither scheduler and budget nor lengths nor seed: a cell that repeats a fitted one judges nothing."""
    fitted = [cell for cell in CELLS if cell.part == FIT]
    judged = [cell for cell in CELLS if cell.part == HELD_OUT]
    assert not {(cell.scheduler, cell.budget) for cell in fitted} & {(cell.scheduler, cell.budget) for cell in judged}
    assert not {cell.lengths for cell in fitted} & {cell.lengths for cell in judged}
    assert len(set(record.seeds(CELLS))) == len({cell.name for cell in CELLS}) == len(CELLS)
    assert sum(cell.overlap for cell in judged) >= 6
    for number, cell in enumerate(CELLS):
        assert cell.of is None or cell.of in {other.name for other in CELLS[:number] if other.part == cell.part}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_fit_the_model(name: str):
    for prompt, output in zip(*lengths_of(name), strict=True):
        assert prompt + output <= calibration_cells.MAX_MODEL_LEN


def lengths_of(name: str) -> tuple[list[int], list[int]]:
    items = LENGTHS[name](num_requests=50, seed=1, vocab_size=100).items()
    return [len(item.prompt_token_ids) for item in items], [item.output_len for item in items]


def test_the_warm_up_begins_where_graphs_end():
    lengths = record.warm_up_lengths(num_parameters=8_000_000_000, longest=32767)
    assert lengths == sorted(lengths)
    assert 376 <= lengths[0] + 16 <= 400
    assert lengths[-1] > 28_000
    assert {length % 16 for length in lengths} == {0, 7}
    assert record.warm_up_lengths(num_parameters=600_000_000, longest=2047) == []
