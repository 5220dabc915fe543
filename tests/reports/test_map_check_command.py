"""The command that checks the KV maps of a sweep against its ledgers."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fake_runs import fake_run

from kvarena.experiments.cli import main as kvarena_command
from kvarena.experiments.correctness import map_check
from kvarena.experiments.recording.kv_map import FREE


def test_the_command_counts_runs_and_names_the_first_step_that_differs(tmp_path, capsys):
    run_dir = fake_run(tmp_path / "sweep" / "a", num_requests=8, kv_map=True)
    steps = pq.read_table(run_dir / "steps.parquet")
    table = pq.read_table(run_dir / "kv_map.parquet")
    owner, filled = np.array([FREE, 0]), np.array([0, 3])
    size = json.loads((run_dir / "manifest.json").read_text())["pool"]["block_size"]
    for column, value in {"token_states": 3, "internal": size - 3, "free": size, "total": 2 * size}.items():
        index = steps.column_names.index(column)
        steps = steps.set_column(index, column, pa.array(np.full(len(steps), value)))
    for column in ("reservation", "external", "shortage", "cached", "held"):
        steps = steps.set_column(steps.column_names.index(column), column, pa.array(np.zeros(len(steps), dtype=int)))
    pq.write_table(steps, run_dir / "steps.parquet")
    columns = {"step": [0, 1], "time": [0.0, 0.1], "owner": [owner.tolist()] * 2, "filled": [filled.tolist()] * 2,
               "stride": [1, 1]}  # fmt: skip
    pq.write_table(pa.table(columns, schema=table.schema), run_dir / "kv_map.parquet")
    assert map_check.main([str(tmp_path / "sweep")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "runs": 1, "exact": 1, "snapshots": 2, "differing": 0,
    }  # fmt: skip
    columns["filled"] = [filled.tolist(), [0, 2]]
    pq.write_table(pa.table(columns, schema=table.schema), run_dir / "kv_map.parquet")
    assert map_check.main([str(tmp_path / "sweep")]) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["differing"] == 1 and line["first"] == "step 1: token_states of cells 2, of the ledger 3"
    assert (line["compared"], line["exact"]) == (["cells"], True)
    (run_dir / "kv_map.parquet").unlink()
    assert kvarena_command(["check", "map-check", str(tmp_path / "sweep")]) == 2
    assert "report.kv_map=true" in capsys.readouterr().err
