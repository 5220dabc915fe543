"""A recorded run, given its step times, is decided again step for step; a run that was decided otherwise is noticed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.replay import replay

# Small enough for preemptions, and slow enough on the wall clock for requests to arrive in the middle of steps.
CELL = [
    "workload=uniform",
    "workload.num_requests=24",
    "workload.prompt_len.max=48",
    "workload.output_len.max=24",
    "engine.max_model_len=128",
    "kv_cache.num_slots=256",
    "scheduler.max_num_batched_tokens=64",
    "arrival=poisson",
    "arrival.rate=150",
    "report.progress=false",
    "report.pages=false",
    "driver.probe=false",
]


def record(folder: Path, *overrides: str) -> RecordedRun:
    folder.mkdir()
    cfg, choices = compose_cell([*CELL, *overrides])
    execute(cfg, folder, "cell", choices)
    return RecordedRun.read(folder)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return record(tmp_path_factory.mktemp("replay") / "run")


# Prefixes of 256 blocks on a pool of 64, with host memory for all of them below it.
LEVELS = ("engine.max_model_len=512", "kv_cache.num_slots=1024", "kv_cache.host_gib=0.05", "workload.num_requests=40",
          "workload.num_prefixes=16", "scheduler.max_num_seqs=3", *CELL[-3:])  # fmt: skip


@pytest.mark.parametrize("allocator", ["paged_prefix", "radix"])
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_run_with_a_level_below_the_pool_decides_the_same_again(allocator: str, overlap: str, tmp_path: Path):
    strategy = (f"allocator={allocator}", "scheduler=chunked", f"engine.overlap={overlap}", "workload=shared_prefix")
    cfg, choices = compose_cell([*strategy, *LEVELS])
    execute(cfg, tmp_path, "cell", choices)
    run = RecordedRun.read(tmp_path)
    assert run.steps["num_copies"].sum() > 100
    assert replay(run).identical, str(replay(run))
    # Without the level it computes what came up.
    del run.manifest["pool"]["host_blocks"]
    assert not replay(run).identical


@pytest.mark.parametrize(
    "overrides",
    [
        ("scheduler=chunked", "engine.overlap=true"),
        ("scheduler=static", "scheduler.max_num_batched_tokens=128"),
        ("allocator=radix", "scheduler=fair", "workload=shared_prefix", "sampling.ignore_eos=false"),
        ("allocator=paged_prefix", "allocator.eviction=workload", "workload=multi_turn"),
        ("allocator=paged", "allocator.swap_blocks=8", "scheduler.preemption=swap"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_strategy_decides_the_same_again(overrides: tuple[str, ...], tmp_path: Path):
    if "workload=multi_turn" in overrides:
        cell = ["engine.max_model_len=1024", "kv_cache.num_slots=4096", "workload.max_total_len=1024", "arrival=trace"]
        cfg, choices = compose_cell([*overrides, *cell, "arrival.speed=20", "workload.num_requests=24", *CELL[-3:]])
        execute(cfg, tmp_path, "cell", choices)
        run = RecordedRun.read(tmp_path)
    elif "workload=shared_prefix" in overrides:
        cell = ["engine.max_model_len=1024", "kv_cache.num_slots=4096", "scheduler.max_num_batched_tokens=512"]
        cfg, choices = compose_cell([*overrides, *cell, "workload.num_requests=12", *CELL[-3:]])
        execute(cfg, tmp_path, "cell", choices)
        run = RecordedRun.read(tmp_path)
    else:
        run = record(tmp_path / "run", *overrides)
    result = replay(run)
    assert result.num_steps > 20
    assert result.identical, str(result)


def test_wall_clock_arrivals_and_preemptions_are_replayed(recorded: RecordedRun):
    assert sum(row["num_preemptions"] for row in recorded.requests) > 0
    result = replay(recorded)
    assert str(result) == f"decisions: identical in {result.num_steps} of {result.num_steps} steps"


def changed(recorded: RecordedRun, folder: Path, **steps: np.ndarray) -> RecordedRun:
    """A copy of the recording with some columns of steps.parquet replaced."""
    folder.mkdir()
    for name in ("manifest.json", "requests.parquet"):
        (folder / name).write_bytes((recorded.path / name).read_bytes())
    pq.write_table(pa.table(recorded.steps | steps), folder / "steps.parquet")
    return RecordedRun.read(folder)


def test_one_other_decision_is_found(recorded: RecordedRun, tmp_path: Path):
    hashes = recorded.steps["decision_hash"].copy()
    hashes[17] += 1
    assert replay(changed(recorded, tmp_path / "run", decision_hash=hashes)).num_identical == 17


def test_another_strategy_is_found(recorded: RecordedRun, tmp_path: Path):
    run = changed(recorded, tmp_path / "run")
    run.manifest["config"]["scheduler"]["max_num_seqs"] = 3
    result = replay(run)
    assert 0 < result.num_identical < result.num_steps


def test_columns_hold_the_features_of_the_steps(recorded: RecordedRun):
    steps = recorded.steps
    decodes = steps["num_prefill_requests"] == 0
    assert (steps["num_attention_pairs"][decodes] == 0).all()
    assert (steps["num_attention_pairs"][~decodes] > 0).all()
    assert (steps["num_kv_tokens"] >= steps["num_new_tokens"]).all()
    # The ledger counts the same slots: what a decode-only step of all that run reads is what was computed.
    everybody = decodes & (steps["num_scheduled"] == steps["num_running"])
    assert (steps["num_kv_tokens"] == steps["token_states"])[everybody].all()
    assert everybody.sum() > 10


def test_a_folder_without_the_columns_is_refused(recorded: RecordedRun, tmp_path: Path):
    for name in ("manifest.json", "requests.parquet"):
        (tmp_path / name).write_bytes((recorded.path / name).read_bytes())
    pq.write_table(pa.table({"step": [0]}), tmp_path / "steps.parquet")
    with pytest.raises(ConfigError, match="lacks launched_time, num_kv_tokens"):
        RecordedRun.read(tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        RecordedRun.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((), "it is a list, not an object"),
        (("config",), "config is a list, not an object"),
        (("config", "engine"), "config.engine is a list"),
        (("config", "allocator"), "config.allocator is a list"),
        (("pool", "num_blocks"), "pool.num_blocks is a list, not integer"),
    ],
)
def test_a_damaged_manifest_is_refused(path: tuple[str, ...], message: str, recorded: RecordedRun, tmp_path: Path):
    run = changed(recorded, tmp_path / "run")
    whole = {"manifest": json.loads(json.dumps(run.manifest))}
    node = whole
    for outer, inner in zip(("manifest", *path), path, strict=False):
        node = node[outer]
        assert inner in node
    node[("manifest", *path)[-1]] = []
    (run.path / "manifest.json").write_text(json.dumps(whole["manifest"]))
    with pytest.raises(ConfigError, match=message):
        RecordedRun.read(run.path)


def test_a_manifest_without_classes_is_refused(recorded: RecordedRun, tmp_path: Path):
    run = changed(recorded, tmp_path / "run")
    manifest = json.loads(json.dumps(run.manifest))
    del manifest["config"]["scheduler"]["_target_"]
    with pytest.raises(ConfigError, match="names no class"):
        RecordedRun(run.path, manifest).strategy()
