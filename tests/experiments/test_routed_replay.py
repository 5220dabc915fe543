"""Two real replicas, each with a runner and a thread of its own, are routed and decided again by the simulator."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.replay import replay
from kvarena.experiments.simulation.routed_replay import replay_routed

CELL = [
    "engine.device=cpu", "allocator=paged_prefix", "scheduler=chunked", "workload=shared_prefix",
    "workload.num_requests=16", "engine.max_model_len=1024", "kv_cache.num_slots=2048", "arrival=poisson",
    "arrival.rate=60", "scheduler.max_num_batched_tokens=256", "report.progress=false", "report.pages=false",
    "driver.probe=false",
]  # fmt: skip


def record(folder: Path, *overrides: str) -> RecordedRun:
    folder.mkdir()
    config, choices = compose_cell([*CELL, *overrides])
    execute(config, folder, "cell", choices)
    return RecordedRun.read(folder)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> RecordedRun:
    return record(tmp_path_factory.mktemp("routed") / "run", "router=kv_exact")


def test_every_route_and_every_step_is_the_same_again(recorded: RecordedRun):
    assert {row["finish_reason"] for row in recorded.requests} == {"length"}
    result = replay_routed(recorded)
    assert min(one.num_steps for one in result.replicas) > 20
    assert result.identical, str(result)
    assert str(result).startswith("routes: the same of 16 of 16 requests; decisions: identical in ")
    # What a replica did is what an engine alone does that gets the same requests.
    assert all(replay(recorded.of_replica(number)).identical for number in range(2))


@pytest.mark.parametrize(
    "overrides",
    [
        ("router=least_kv", "allocator=paged", "engine.overlap=true", "kv_cache.num_slots=1024"),
        ("router=prefix_affinity", "allocator=radix", "scheduler=fair"),
        ("router=power_of_two", "allocator=contiguous", "scheduler=continuous", "sampling.ignore_eos=false"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_strategies_and_loops_too(overrides: tuple[str, ...], tmp_path: Path):
    result = replay_routed(record(tmp_path / "run", *overrides))
    assert result.identical, str(result)


def changed(recorded: RecordedRun, folder: Path, name: str, table: pa.Table) -> RecordedRun:
    """A copy of the recording with another file in place of one."""
    folder.mkdir()
    for path in recorded.path.glob("*.*"):
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    pq.write_table(table, folder / name)
    return RecordedRun.read(folder)


def test_a_route_that_was_another_is_noticed(recorded: RecordedRun, tmp_path: Path):
    routing = pq.read_table(recorded.path / "routing.parquet")
    replicas = routing.column("replica").to_pylist()
    replicas[-1] = 1 - replicas[-1]
    other = routing.set_column(0, "replica", pa.array(replicas, pa.int32()))
    result = replay_routed(changed(recorded, tmp_path / "other", "routing.parquet", other))
    assert result.num_same_replica == 15 and not result.identical


def test_a_step_that_was_decided_otherwise_is_noticed(recorded: RecordedRun, tmp_path: Path):
    steps = pq.read_table(recorded.path / "steps.parquet")
    place = steps.column_names.index("decision_hash")
    hashes = steps.column("decision_hash").to_pylist()
    hashes[-1] += 1
    other = steps.set_column(place, "decision_hash", pa.array(hashes, pa.int64()))
    result = replay_routed(changed(recorded, tmp_path / "other", "steps.parquet", other))
    assert result.num_same_replica == 16
    assert sum(one.num_steps - one.num_identical for one in result.replicas) == 1


def test_a_run_of_one_engine_has_no_routes(tmp_path: Path):
    run = record(tmp_path / "run", "workload.num_requests=2")
    with pytest.raises(ConfigError, match="ran on one engine, and nothing was routed"):
        replay_routed(run)
