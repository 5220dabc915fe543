"""The recorded map says what the allocator says."""

from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.recording.kv_map import CACHED, FREE, SHARED, KVMapRecorder
from kvarena.experiments.simulation.runner import SimulatedRunner
from kvarena.schedulers.continuous import ContinuousScheduler

BLOCK_SIZE, NUM_BLOCKS = 4, 24


def run(allocator, num_requests, output_len, *, prompt=None, **options):
    """Run requests one token a second; request i has row num_requests - 1 - i."""
    recorder = KVMapRecorder(allocator, lambda req: num_requests - 1 - int(req.request_id[1:]), **options)
    scheduler = ContinuousScheduler(allocator, max_model_len=64, max_num_seqs=2)
    clock = VirtualClock()
    engine = Engine(scheduler, allocator, SimulatedRunner(lambda _: 1.0, clock), clock, on_launch=recorder.on_launch)
    requests = [
        Request(f"r{i}", prompt or [100 * i + j + 1 for j in range(6)], SamplingParams(max_tokens=output_len))
        for i in range(num_requests)
    ]
    run_to_completion(engine, requests)
    return recorder


def read(recorder, path):
    recorder.write(path)
    return pq.read_table(path).to_pylist()


def test_owners_and_fills_of_a_paged_run(tmp_path):
    allocator = PagedAllocator(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=64)
    recorder = run(allocator, 3, 4)
    snapshots = read(recorder, tmp_path / "kv_map.parquet")
    first = snapshots[0]
    assert first["step"] == 0
    assert first["stride"] == 1
    assert len(first["owner"]) == NUM_BLOCKS
    assert sorted(set(first["owner"])) == [FREE, 1, 2]  # r1 and r0 run; r2 waits
    assert sum(first["filled"]) == 12
    assert [sum(np.array(first["owner"]) == row) for row in (2, 1)] == [2, 2]
    by_request = np.array(snapshots[2]["filled"])[np.array(snapshots[2]["owner"]) == 2]
    assert by_request.sum() == 8  # 6 of the prompt and 2 decoded
    assert 0 in snapshots[-1]["owner"]  # r2, later


@pytest.mark.parametrize("make", [PrefixCachingAllocator, RadixAllocator])
def test_cached_and_shared_blocks(make, tmp_path):
    allocator = make(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=64)
    prompt = list(range(1, 14))
    recorder = run(allocator, 4, 5, prompt=prompt)
    owners = [set(snapshot["owner"]) for snapshot in read(recorder, tmp_path / "kv_map.parquet")]
    assert any(SHARED in owner for owner in owners)
    num_cached = allocator.usage().cached
    again = run(allocator, 1, 2, prompt=[50, 51, 52])
    snapshot = read(again, tmp_path / "again.parquet")[0]
    cached = np.array(snapshot["owner"]) == CACHED
    assert cached.sum() * BLOCK_SIZE == num_cached > 0
    assert (np.array(snapshot["filled"])[cached] == BLOCK_SIZE).all()


def test_a_region_is_one_run_and_memory_is_bounded(tmp_path):
    allocator = ContiguousAllocator(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=32, reservation="max")
    recorder = run(allocator, 2, 26, max_snapshots=8, max_cells=12)
    snapshots = read(recorder, tmp_path / "kv_map.parquet")
    assert 4 <= len(snapshots) <= 8
    steps = [snapshot["step"] for snapshot in snapshots]
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert snapshots[0]["stride"] == 2
    owner = np.array(snapshots[0]["owner"])
    assert len(owner) == 12
    assert (np.diff(np.flatnonzero(owner == 1)) == 1).all()
    assert (owner == 1).sum() == 4  # every second of 8 blocks


def test_preempted_requests_own_nothing(tmp_path):
    allocator = PagedAllocator(num_blocks=8, block_size=BLOCK_SIZE, max_model_len=32)
    snapshots = read(run(allocator, 2, 20), tmp_path / "kv_map.parquet")
    owners = [set(snapshot["owner"]) - {FREE} for snapshot in snapshots]
    assert {1} in owners  # alone after the other had to go
    assert owners[-1] == {0}


def test_a_pool_of_any_size_costs_a_snapshot_its_cells_alone(tmp_path):
    """A snapshot held an entry for every block of the pool, which no memory has room for."""
    allocator = PagedAllocator(num_blocks=10**12, block_size=BLOCK_SIZE, max_model_len=64)
    recorder = run(allocator, 3, 4, max_cells=8)
    first = read(recorder, tmp_path / "kv_map.parquet")[0]
    assert first["stride"] == 10**12 // 8
    assert first["owner"] == [2, *[FREE] * 7]
    assert first["filled"] == [BLOCK_SIZE, *[0] * 7]
