"""The KV map and the memory ledger tell the same story, snapshot by snapshot, under every strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.runner.oracle import OracleRunner
from experiments.correctness import map_check
from experiments.correctness.map_check import Snapshot, difference, excess
from experiments.correctness.matrix import Cell, allocator_cells, allocator_options, build_cell, drive
from experiments.correctness.random_traces import VOCAB_SIZE, make_trace
from experiments.correctness.recount import Recount
from experiments.recording.kv_map import CACHED, FREE, KVMapRecorder
from experiments.strategies import strategy_names

BLOCK = 4
LEDGER = {"token_states": 6, "reservation": 1, "internal": 1, "external": 0, "shortage": 4, "free": 0, "cached": 4}
OWNER, FILLED = np.array([0, 0, CACHED, FREE]), np.array([4, 2, 4, 0])


class WithMap(Recount):
    """Draws a snapshot of every step beside the recount, and keeps the ledger."""

    def __init__(self, allocator: Any, scheduler: Any, options: dict[str, Any]) -> None:
        super().__init__(allocator, scheduler, options)
        rows: dict[Any, int] = {}
        self.recorder = KVMapRecorder(allocator, lambda req: rows.setdefault(req, len(rows)), max_snapshots=10**6)
        self.ledger: dict[str, np.ndarray] = {}

    def observe(self, step: Any) -> None:
        super().observe(step)
        self.recorder.on_launch(step)

    def check(self, settled: Any) -> None:
        super().check(settled)
        self.ledger = settled


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
@pytest.mark.parametrize(("allocator", "window"), allocator_cells())
def test_map_and_ledger_agree_in_every_step(allocator, window, scheduler, tmp_path):
    for seed in range(3):
        trace, cell = make_trace(seed), Cell(allocator, scheduler, seed == 1, window)
        blocks, policy = build_cell(trace, cell)
        watched = WithMap(blocks, policy, allocator_options(trace, cell))
        drive(trace, blocks, policy, OracleRunner(VOCAB_SIZE, window), watched, cell.overlap)
        watched.recorder.write(tmp_path / "kv_map.parquet")
        stride, snapshots = map_check.read_snapshots(tmp_path / "kv_map.parquet")
        assert stride == 1 and len(snapshots) == len(watched.ledger["total"])
        for snapshot in snapshots:
            step = {name: int(column[snapshot.step]) for name, column in watched.ledger.items()}
            assert difference(snapshot, step, blocks.block_size, mapped=allocator == "virtual") == ""


def test_a_cell_too_few_or_a_slot_too_many_is_told():
    right = Snapshot(3, OWNER, FILLED)
    assert difference(right, LEDGER, BLOCK, mapped=False) == difference(right, LEDGER, BLOCK, mapped=True) == ""
    lost = Snapshot(3, np.array([0, FREE, CACHED, FREE]), np.array([4, 0, 4, 0]))
    assert difference(lost, LEDGER, BLOCK, mapped=False) == (
        "step 3: map and ledger have token_states 4 and 6, owned 4 and 8, not owned 8 and 4"
    )
    assert "owned slots" in difference(lost, LEDGER, BLOCK, mapped=True)
    fuller = Snapshot(3, OWNER, np.array([4, 3, 4, 0]))
    assert "token_states 7 and 6" in difference(fuller, LEDGER, BLOCK, mapped=False)


def test_a_map_of_every_kth_block_may_show_less_and_not_more():
    assert excess(Snapshot(0, OWNER[:1], FILLED[:1]), LEDGER, BLOCK) == ""
    assert excess(Snapshot(0, OWNER, np.array([4, 3, 4, 0])), LEDGER, BLOCK)
    assert excess(Snapshot(0, np.array([0, 0, 0, 0]), np.array([4, 2, 0, 0])), LEDGER, BLOCK)
