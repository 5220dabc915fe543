"""The recording for the calibration, on a CPU: the demo model, by the same config; its cells are packed and replay."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.models import recordings as tool
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.recordings import make_folders, recording_names
from kvarena.experiments.simulation.replay import replay
from kvarena.experiments.studies import record
from kvarena.experiments.studies.calibration_cells import (
    CELLS,
    FIT,
    HELD_OUT,
    LENGTHS,
    lengths_overrides,
    seeds,
    warm_up_lengths,
)
from kvarena.experiments.studies.record import RecordStudy
from kvarena.reports.pages.run_report import write_run_report

ON_A_CPU = (
    "experiment=record", "engine.device=cpu", "engine.dtype=float32", "engine.max_model_len=2048",
    "kv_cache.num_slots=16384", "study.models=[demo]", "study.share=0.003", "study.limit=600",
)  # fmt: skip
# A load that refers to another cell, a pool of its own, and the loop without overlap.
NAMES = [
    "continuous8192-sharegpt-once",
    "chunked512-sharegpt-load0.3",
    "contiguous-fair1024-even-once",
    "sjf1024-mid-once-plain",
]
HASH = "0" * 40


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "CELLS", tuple(cell for cell in CELLS if cell.name in NAMES))
        patch.setattr(record, "MIXED_STEPS", record.MIXED_STEPS[:1])
        findings, cells = run_study(out, *ON_A_CPU)
    assert [folder.name for folder in cells.folders] == [f"demo-{name}" for name in NAMES]
    assert findings.headline == "4 of 4 cells are recorded."
    return out


@pytest.fixture(scope="module")
def packed(recorded, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed")
    assert tool.main(["keep", str(recorded), str(target), "--commit", HASH]) == 0
    return target


def test_a_packed_cell_is_the_run_and_replays(recorded, packed, tmp_path):
    assert recording_names(packed) == ["demo"]
    made = make_folders(packed, tmp_path)
    assert [folder.name for folder in made] == [f"demo-{name}" for name in NAMES]  # in the table's order
    for folder in made:
        run, own = RecordedRun.read(folder), recorded / "cells" / folder.name
        assert run.overlap is not folder.name.endswith("plain")
        assert run.manifest["calibration"]["part"] in (FIT, HELD_OUT)
        assert run.manifest["git"] == {"commit": HASH, "dirty": False}
        assert {row["num_output_tokens"] - row["max_tokens"] for row in run.requests} == {0}
        assert len({row["client_id"] for row in run.requests}) > 1
        assert len({row["priority"] for row in run.requests}) > 1
        assert replay(run).identical
        steps, before = (pq.read_table(where / "steps.parquet").to_pandas() for where in (folder, own))
        assert (steps["decision_hash"] == before["decision_hash"]).all()
        assert np.abs(steps["end_time"] - before["end_time"]).max() < 1e-8
        assert (steps["longest_prefill"] > 0).equals(steps["num_prefill_requests"] > 0)
    assert RecordedRun.read(made[2]).manifest["pool"]["num_slots"] == 98_304
    served = RecordedRun.read(made[0]).manifest["calibration"]["served"]
    assert RecordedRun.read(made[1]).manifest["arrival"]["rate"] == pytest.approx(0.3 * served)
    write_run_report(made[0])


def test_a_second_call_keeps_the_cells(recorded, monkeypatch, capsys):
    monkeypatch.setattr(record, "CELLS", tuple(cell for cell in CELLS if cell.name in NAMES[2:]))
    monkeypatch.setattr(record.RecordStudy, "_warm_up", lambda *_: None)
    run_study(recorded, *ON_A_CPU)
    assert capsys.readouterr().err.count("finished before") == 2


def test_of_a_cell_that_ran_again_the_last_is_packed(recorded, tmp_path):
    name = f"demo-{NAMES[3]}"
    for folder, created in ((name, "2030-01-01T00:00:00+00:00"), (f"{name}-2", "2031-01-01T00:00:00+00:00")):
        shutil.copytree(recorded / "cells" / name, tmp_path / "cells" / folder)
        manifest = tmp_path / "cells" / folder / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created": created}))
    tool.keep(tmp_path, tmp_path / "packed")
    [folder] = make_folders(tmp_path / "packed", tmp_path / "runs")
    assert RecordedRun.read(folder).manifest["created"].startswith("2031")


def test_no_cell_starts_after_the_limit(tmp_path):
    findings, cells = run_study(tmp_path, *ON_A_CPU, "study.limit=0")
    assert not cells.folders
    assert findings.headline.startswith(f"0 of {len(CELLS)} cells are recorded; left out, for want of time: demo-")
    with pytest.raises(ConfigError, match="holds no finished cells"):
        tool.keep(tmp_path, tmp_path / "packed")
    with pytest.raises(ConfigError, match="holds no recordings"):
        recording_names(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": []}, r"study\.models=\[\] must be a list"),
        ({"models": "demo"}, r"study\.models=demo must be a list"),
        ({"models": ["demo"], "share": 0}, r"study\.share=0 must be"),
        ({"models": ["demo"], "share": 2}, r"study\.share=2 must be at most 1"),
    ],
)
def test_a_bad_option_is_one_line(options, said):
    with pytest.raises(ConfigError, match=said):
        RecordStudy(**options)


def test_a_file_that_is_no_recording_is_one_line(tmp_path):
    (tmp_path / "demo-requests.parquet").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a recording"):
        make_folders(tmp_path, tmp_path / "runs")
    with pytest.raises(ConfigError, match="is not a run folder"):
        tool.read_cell(tmp_path)
    with pytest.raises(ConfigError, match="mine is no cell of experiment=record"):
        record.cell_of({"name": "mine"})


def test_held_out_cells_share_nothing_with_fitted_ones():
    """Neither scheduler and budget nor lengths nor seed: a cell that repeats a fitted one judges nothing."""
    fitted = [cell for cell in CELLS if cell.part == FIT]
    judged = [cell for cell in CELLS if cell.part == HELD_OUT]
    assert not {(cell.scheduler, cell.budget) for cell in fitted} & {(cell.scheduler, cell.budget) for cell in judged}
    assert not {cell.lengths for cell in fitted} & {cell.lengths for cell in judged}
    assert len(set(seeds(CELLS))) == len({cell.name for cell in CELLS}) == len(CELLS)
    assert sum(cell.overlap for cell in judged) >= 6
    for number, cell in enumerate(CELLS):
        assert cell.of is None or cell.of in {other.name for other in CELLS[:number] if other.part == cell.part}
        assert record.cell_of({"name": f"llama-3.1-8b-shape-{cell.name}"}) is cell


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_fit_the_model(name):
    config = load_run(["experiment=record", "study=null", *lengths_overrides(name), "workload.num_requests=50"])
    items = instantiate(config.workload, vocab_size=100).items()
    longest = max(len(item.prompt_token_ids) + item.output_len for item in items)
    assert 100 < longest <= config.engine.max_model_len == 32_768


@pytest.mark.parametrize("index", [0, 2, 3, 7, 10, 11, 15, 16, 17])  # each of the lengths, a load, and the other pool
def test_the_cells_are_those_of_the_recordings(index):
    """Those in the repository were recorded before there were configs for them: the same requests, the same options."""
    table = pq.read_table("docs/results/h200-simulator/recordings/qwen3-0.6b-requests.parquet")
    manifest = json.loads(table.schema.metadata[b"manifests"])[index]
    kept = table.to_pandas().query("cell == @index")
    cell, seed = CELLS[index], seeds(CELLS)[index]
    assert manifest["name"] == cell.name
    rate = manifest["arrival"].get("rate")
    config = load_run(["experiment=record", "study=null", *cell.overrides("qwen3-0.6b-shape", seed, rate)])
    workload = instantiate(config.workload, vocab_size=100)
    drawn = workload.table
    assert drawn.prompt_lens.tolist() == kept["num_prompt_tokens"].tolist()
    # Then an output had two tokens at least.
    assert np.maximum(drawn.output_lens, 2).tolist() == kept["num_output_tokens"].tolist()
    assert list(drawn.client_ids) == kept["client_id"].tolist()
    assert list(drawn.priorities) == kept["priority"].tolist()
    times = instantiate(config.arrival).times(workload.items(), seed)
    assert times == pytest.approx(kept["arrival_time"].to_numpy(), abs=1e-8)
    for section in ("allocator", "scheduler"):
        stated = {key: value for key, value in manifest["config"][section].items() if key != "_target_"}
        assert stated.items() <= getattr(config, section).settings.items()
    assert config.kv_cache.num_slots == manifest["config"]["kv_cache"]["num_slots"] // 16 * 16
    assert config.engine.overlap is manifest["config"]["engine"]["overlap"]


def test_the_warm_up_begins_where_graphs_end():
    lengths = warm_up_lengths(active_parameters=8_000_000_000, longest=32767)
    assert lengths == sorted(lengths)
    assert 750 <= lengths[0] + 16 <= 768
    assert lengths[-1] > 28_000
    assert {length % 16 for length in lengths} == {0, 7}
    assert warm_up_lengths(active_parameters=600_000_000, longest=2047) == []
