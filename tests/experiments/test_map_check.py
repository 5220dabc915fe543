"""The KV map and the memory ledger tell the same story, snapshot by snapshot, under every strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvarena.experiments.correctness import map_check
from kvarena.experiments.correctness.map_check import COUNTS, Snapshot, difference, has_whole_blocks
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.fuzzing.matrix import Cell, allocator_cells, allocator_options, build_cell, drive
from kvarena.experiments.fuzzing.random_traces import VOCAB_SIZE, make_trace
from kvarena.experiments.fuzzing.recount import Recount
from kvarena.experiments.recording.kv_map import CACHED, EXTERNAL, FREE, KVMapRecorder
from kvarena.experiments.settings.strategies import strategy_names

BLOCK = 4
LEDGER = {"token_states": 6, "reservation": 1, "internal": 1, "external": 0, "shortage": 4, "free": 0, "cached": 4}
POOL = {"block_size": BLOCK}
OWNER, FILLED = np.array([0, 0, CACHED, FREE]), np.array([4, 2, 4, 0])


class WithMap(Recount):
    """Draws a snapshot of every step beside the recount, in all cells and in few, and keeps the ledger."""

    def __init__(self, allocator: Any, scheduler: Any, options: dict[str, Any]) -> None:
        super().__init__(allocator, scheduler, options)
        rows: dict[Any, int] = {}
        self.recorders = [
            KVMapRecorder(
                allocator, lambda req: rows.setdefault(req, len(rows)), max_snapshots=10**6, max_cells=max_cells
            )
            for max_cells in (10**6, 7)
        ]
        self.ledger: dict[str, np.ndarray] = {}

    def observe(self, step: Any) -> None:
        super().observe(step)
        for recorder in self.recorders:
            recorder.on_launch(step)

    def check(self, settled: Any) -> None:
        super().check(settled)
        self.ledger = settled


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one trace", "every trace"])
@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
@pytest.mark.parametrize(("allocator", "window"), allocator_cells())
def test_map_and_ledger_agree_in_every_step(allocator, window, scheduler, tmp_path, every):
    """Cells where every block has one; what was counted over all blocks where only some have.

    One trace for each pair, with and without overlap in turn; both traces in `make test-all`.
    """
    place = allocator_cells().index((allocator, window)) + strategy_names("scheduler").index(scheduler)
    for seed in range(2) if every else [place % 2]:
        trace, cell = make_trace(seed), Cell(allocator, scheduler, seed == 1, window)
        blocks, policy = build_cell(trace, cell)
        watched = WithMap(blocks, policy, allocator_options(trace, cell))
        drive(trace, blocks, policy, OracleRunner(VOCAB_SIZE, window), watched, cell.overlap)
        pool = {"block_size": blocks.block_size}
        if allocator == "virtual":
            pool["pages"] = {"page_tokens": blocks.page_tokens, "page_bytes": None}
        for recorder, name in zip(watched.recorders, ("all", "few"), strict=True):
            recorder.write(tmp_path / f"{name}.parquet")
            stride, snapshots = map_check.read_snapshots(tmp_path / f"{name}.parquet")
            assert (stride > 1) is (name == "few") and len(snapshots) == len(watched.ledger["total"])
            for snapshot in snapshots:
                step = {name: int(column[snapshot.step]) for name, column in watched.ledger.items()}
                assert difference(snapshot, step, pool, stride) == ""
                lost = step | {"token_states": step["token_states"] + 1}
                assert "token_states of blocks" in difference(snapshot, lost, pool, stride)


def counted(owner: np.ndarray, filled: np.ndarray) -> Snapshot:
    """A snapshot whose blocks were counted as its cells are."""
    return Snapshot(3, owner, filled, Snapshot(3, owner, filled).cells())


def test_a_cell_too_few_or_a_slot_too_many_is_told():
    assert difference(counted(OWNER, FILLED), LEDGER, POOL) == ""
    assert difference(Snapshot(3, OWNER, FILLED), LEDGER, POOL) == ""
    lost = Snapshot(3, np.array([0, FREE, CACHED, FREE]), np.array([4, 0, 4, 0]), counted(OWNER, FILLED).counts)
    assert difference(lost, LEDGER, POOL) == (
        "step 3: token_states of cells 4, of the ledger 6; owned of cells 4, of the ledger 8; "
        "cells rounded up 0 and free 8, of the ledger {'external': 0, 'shortage': 4, 'free': 0}"
    )
    fuller = counted(OWNER, np.array([4, 3, 4, 0]))
    assert "token_states of blocks 7, of the ledger 6" in difference(fuller, LEDGER, POOL, stride=2)


def test_free_cells_are_of_one_class_and_rounded_up_ones_external():
    rounded_up = counted(np.array([0, 0, CACHED, EXTERNAL]), FILLED)
    assert "rounded up 4 and free 0" in difference(rounded_up, LEDGER, POOL)
    assert difference(rounded_up, LEDGER | {"shortage": 0, "external": 4}, POOL) == ""
    assert "free 4" in difference(counted(OWNER, FILLED), LEDGER | {"shortage": 2, "free": 2}, POOL)


def test_cells_of_every_kth_block_may_show_less_than_all_blocks_and_not_more():
    counts = counted(OWNER, FILLED).counts
    assert difference(Snapshot(3, OWNER[:1], FILLED[:1], counts), LEDGER, POOL, stride=4) == ""
    more = difference(Snapshot(3, np.array([0, 0, 1]), np.array([4, 4, 4]), counts), LEDGER, POOL, stride=2)
    assert more == "step 3: owned_blocks of cells 3, of all 2; filled_slots of cells 12, of all 6"
    assert "filled_slots" in difference(Snapshot(3, OWNER, np.array([4, 3, 4, 0])), LEDGER, POOL, stride=2)


def test_a_page_that_ends_inside_a_block_leaves_owned_blocks_a_range():
    assert has_whole_blocks(POOL)
    pages = {"page_tokens": 6, "page_bytes": 96, "kv_tensors": 2}
    pool = POOL | {"pages": pages, "num_slots": 16, "bytes": 512}
    assert not has_whole_blocks(pool)
    assert has_whole_blocks(pool | {"pages": pages | {"page_tokens": 8, "page_bytes": 128}})
    assert not has_whole_blocks(pool | {"pages": pages | {"page_tokens": 8, "page_bytes": 130}})
    counts = dict(zip(COUNTS, (2, 6, 1), strict=True))
    snapshot = Snapshot(3, OWNER, FILLED, counts)
    assert difference(snapshot, LEDGER | {"internal": 0, "reservation": 0}, pool) == ""
    assert "owned of cells" in difference(snapshot, LEDGER | {"internal": 2}, pool)
