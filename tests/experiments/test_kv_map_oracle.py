"""The map that is recorded at little cost is the one that a slow look at every block of every request draws."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvarena.allocators.placement import Buddy
from kvarena.engine.core import Engine
from kvarena.experiments.fuzzing.matrix import Cell, allocator_cells, run_cell
from kvarena.experiments.fuzzing.random_traces import make_trace
from kvarena.experiments.recording.kv_map import CACHED, EXTERNAL, FREE, SHARED, KVMapRecorder
from kvarena.experiments.settings import strategies
from kvarena.experiments.settings.strategies import strategy_names

TRACES = [make_trace(seed) for seed in range(200, 203)]


class SlowLook:
    """Draws every step's map while it is there, request by request; also adds up what is computed and owned."""

    def __init__(self, allocator, row_of, stride):
        self.allocator, self.row_of, self.stride = allocator, row_of, stride
        self.is_buddy = isinstance(getattr(allocator, "_placement", None), Buddy)
        self.residents = {}
        self.snapshots = []

    def on_launch(self, step):
        for req in (*step.plan.admitted, *(entry.req for entry in step.plan.scheduled)):
            self.residents[req] = self.row_of(req)
        block_size, num_blocks = self.allocator.block_size, self.allocator.num_virtual_blocks
        owners = {block: [] for block in range(1, num_blocks + 1)}
        filled = dict.fromkeys(owners, 0)
        rounded_up = set()
        for req, row in self.residents.items():
            if req.num_slots:
                for index, block in enumerate(self.allocator.block_table(req)):
                    if block:
                        owners[block].append(row)
                        inside = max(0, min(block_size, req.num_computed_tokens - index * block_size))
                        filled[block] = max(filled[block], inside)
                if self.is_buddy:  # sizes are powers of two
                    table = self.allocator.block_table(req)
                    extent = next(2**i for i in range(64) if 2**i >= len(table))
                    rounded_up |= set(range(table[0] + len(table), table[0] + extent))
        for block in self.allocator.cached_blocks():
            assert not owners[block]
            owners[block], filled[block] = [CACHED], block_size
        for block in rounded_up:
            assert not owners[block]
            owners[block] = [EXTERNAL]
        looked_at = range(1, num_blocks + 1, self.stride)
        self.snapshots.append((
            step.index,
            [FREE if not owners[b] else owners[b][0] if len(owners[b]) == 1 else SHARED for b in looked_at],
            [filled[b] for b in looked_at],
            step.usage,
        ))  # fmt: skip


def watch(monkeypatch, recorders, max_cells, **options):
    """Attach a recorder and a slow look to every engine that the matrix makes."""

    def make(scheduler, allocator, *args, on_launch, **kwargs):
        rows = {}

        def row_of(req):
            return rows.setdefault(req, len(rows))

        recorder = KVMapRecorder(allocator, row_of, max_cells=max_cells, **options)
        slow = SlowLook(allocator, row_of, recorder._stride)
        recorders.append((recorder, slow))

        def look(step):
            on_launch(step)
            slow.on_launch(step)
            recorder.on_launch(step)

        return Engine(scheduler, allocator, *args, on_launch=look, **kwargs)

    monkeypatch.setattr(strategies, "Engine", make)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one trace", "every trace"])
@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
@pytest.mark.parametrize(("allocator", "window"), allocator_cells())
def test_every_step_is_drawn_as_the_slow_look_draws_it(monkeypatch, tmp_path, allocator, window, scheduler, every):
    """A trace for each pair here, so that each strategy sees each of them; all of all in `make test-all`."""
    recorders = []
    # Few cells in the last trace, so that only some blocks are looked at.
    traces = list(zip(TRACES, (10**6, 10**6, 7), (False, True, True), strict=True))
    place = allocator_cells().index((allocator, window)) + strategy_names("scheduler").index(scheduler)
    for trace, max_cells, overlap in traces if every else [traces[place % 3]]:
        watch(monkeypatch, recorders, max_cells, max_snapshots=10**6)
        run_cell(trace, Cell(allocator, scheduler, overlap, window))
    num_snapshots = 0
    for recorder, slow in recorders:
        recorder.write(tmp_path / "map.parquet")
        drawn = pq.read_table(tmp_path / "map.parquet").to_pylist()
        assert [snapshot["step"] for snapshot in drawn] == [step for step, *_ in slow.snapshots]
        for snapshot, (step, owner, filled, usage) in zip(drawn, slow.snapshots, strict=True):
            assert (snapshot["owner"], snapshot["filled"]) == (owner, filled), f"step {step}"
            if recorder._stride == 1:
                of_requests = np.array(filled)[np.array(owner) != CACHED]
                assert of_requests.sum() == usage.computed
        num_snapshots += len(drawn)
    assert num_snapshots > (50 if every else 5)


@pytest.mark.parametrize("allocator", ["paged", "paged_prefix", "radix", "contiguous"])
def test_what_is_seen_now_and_then_is_as_right_as_what_is_seen_always(monkeypatch, tmp_path, allocator):
    """Between two snapshots tables change more than once: copies, preemptions and commits must not get lost."""
    recorders = []
    watch(monkeypatch, recorders, 10**6, max_snapshots=16)
    for trace in TRACES:
        run_cell(trace, Cell(allocator, "continuous"))
    for recorder, slow in recorders:
        recorder.write(tmp_path / "map.parquet")
        drawn = pq.read_table(tmp_path / "map.parquet").to_pylist()
        assert 4 <= len(drawn) <= 16
        by_step = {step: (owner, filled) for step, owner, filled, _ in slow.snapshots}
        assert all((snapshot["owner"], snapshot["filled"]) == by_step[snapshot["step"]] for snapshot in drawn)
