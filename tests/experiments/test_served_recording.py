"""What a server's recorder leaves is what a run leaves, in whatever pieces it comes; and of too much the latest."""

import itertools
import json
import pickle
import random
import stat
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.build import build
from kvarena.experiments.caching.accesses import num_blocks_in_all
from kvarena.experiments.correctness.map_check import check_run
from kvarena.experiments.folders import recordings
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.served.recorder import ServedRecorder
from kvarena.experiments.recording.served.window import Bounds
from kvarena.experiments.recording.served.writer import Opening, Writer, packed
from kvarena.experiments.settings.compose import compose_cell
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.files import read_run

CELL = ("runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=auto", "kv_cache.num_slots=4096",
        "arrival=poisson", "arrival.rate=20", "workload=shared_prefix", "workload.num_requests=40",
        "scheduler.max_num_seqs=8",
        "report.progress=false", "report.pages=false")  # fmt: skip
STRATEGIES = [
    ("paged_prefix", "chunked", "true"), ("radix", "fair", "false"), ("contiguous", "static", "false"),
    ("paged", "continuous", "true"), ("virtual", "sjf", "false"),
]  # fmt: skip
LARGE = Bounds(2**40, 1e9, "tokens", 16, b"k", 256)
# Prefixes of 256 blocks on a pool of 128, with 512 below it.
LEVELS = ("kv_cache.num_slots=2048", "kv_cache.host_gib=1", "workload.num_prefixes=16", "scheduler.max_num_seqs=3",
          "allocator.eviction=lru")  # fmt: skip


class Pieces:
    """Stands for the writer's process: takes what would go over the pipe."""

    fault = ""

    def __init__(self, folder):
        self.said = []
        self.writer = Writer(folder, self.said.append, clock=lambda: 0.0)

    def put(self, message):
        self.writer.take(pickle.loads(packed(message)[8:]))

    def close(self):
        self.writer.write(is_end=True)


class Told:
    """The driver's recorder, which tells a server's; every few steps what there is is handed on."""

    def __init__(self, recorder, seed):
        self.recorder, self.random = recorder, random.Random(seed)
        self.on_submit, self.on_rejected = recorder.on_submit, recorder.on_refused

    def on_step(self, step):
        self.recorder.on_step(step)
        if self.random.random() < 0.2:
            self.recorder._flush()


def record(folder, overrides, bounds=LARGE, manifest=None, seed=0):
    """Run a cell and record it as a server's; its folder and what the writer said."""
    config, _ = compose_cell([*CELL, *overrides])
    setup = build(config)
    pieces = Pieces(folder)
    if bounds.num_blocks:
        bounds = replace(bounds, num_blocks=num_blocks_in_all(setup.parts.engine.allocator))
    recorder = ServedRecorder(setup.parts.engine, Opening(manifest or {}, bounds, 0.0), pieces)
    recorder._map._max_share, recorder._map._interval = None, 0.05
    setup.load.prepare(setup.parts.engine)
    drive(setup.parts.engine, setup.load.requests, Told(recorder, seed), after_step=setup.parts.simulator.after_step)
    assert recorder.is_on
    recorder.close()
    return pieces


@pytest.mark.parametrize("strategy", [*STRATEGIES, ("paged_prefix", "chunked", "true", *LEVELS)], ids=" ".join)
def test_pieces_are_put_together_to_what_a_run_leaves(tmp_path, strategy):
    allocator, scheduler, overlap, *levels = strategy
    overrides = (f"allocator={allocator}", f"scheduler={scheduler}", f"engine.overlap={overlap}", *levels)
    whole, served = tmp_path / "whole", tmp_path / "served"
    for folder in (whole, served):
        folder.mkdir()
    config, choices = compose_cell([*CELL, *overrides])
    execute(config, whole, "whole", choices)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert not record(served, overrides, manifest=manifest).said
    files = ["requests.parquet", "steps.parquet"]
    if allocator in ("paged_prefix", "radix"):
        files.append("reuse.parquet")
    assert (served / "reuse.parquet").exists() == (whole / "reuse.parquet").exists() == (len(files) == 3)
    # More of what was asked for was found than the pool had.
    assert not levels or pq.read_table(served / "reuse.parquet").column("num_cached_tokens").to_numpy().sum() > 6000
    for name in files:
        ours, theirs = pq.read_table(served / name), pq.read_table(whole / name)
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        zero = theirs.column("arrival_time")[0].as_py() if name.startswith("req") else 0.0
        for column in theirs.column_names:
            left, right = ours.column(column).to_pylist(), theirs.column(column).to_pylist()
            if column.endswith("_time") and column != "copy_time":
                zero = right[0] - left[0] if column in ("arrival_time", "start_time") else zero
                left = [None if value is None else value + zero for value in left]
                assert left == pytest.approx(right), column
            elif column == "token_times":
                assert [value + zero for row in left for value in row] == pytest.approx(
                    [value for row in right for value in row]
                ), column
            else:
                assert left == (pytest.approx(right) if column == "seconds" else right), column
    found = check_run(served)
    assert found["snapshots"] > 3 and not found["differing"], found["first"]
    found = json.loads((served / "manifest.json").read_text())
    assert found["recording"]["end"] == "orderly" and found["recording"]["num_open"] == 0
    assert write_run_report(served)["num_finished"] == 40


@pytest.mark.parametrize(("allocator", "scheduler", "overlap"), STRATEGIES)
def test_of_too_much_the_latest_is_kept_and_it_adds_up(tmp_path, allocator, scheduler, overlap):
    overrides = (f"allocator={allocator}", f"scheduler={scheduler}", f"engine.overlap={overlap}",
                 "workload.num_requests=120")  # fmt: skip
    manifest = manifest_of(tmp_path, overrides)
    folder = tmp_path / "latest"
    folder.mkdir()
    pieces = record(folder, overrides, Bounds(150_000, 1e9, "tokens", 16, b"k"), manifest)
    assert not pieces.said
    dropped = json.loads((folder / "manifest.json").read_text())["recording"]["dropped"]
    assert dropped["steps"] > 0 and dropped["requests"] > 0
    # What the cache held when the first of these steps came, nobody knows.
    assert not json.loads((folder / "manifest.json").read_text())["recording"]["has_bound"]
    assert not (folder / "reuse.parquet").exists()
    run = read_run(folder)  # the classes add up
    assert 0 < run.num_requests < 120 and run.num_requests + dropped["requests"] == 120
    assert not check_run(folder)["differing"]
    lengths = run.list_lengths("token_times"), run.list_lengths("output_token_ids")
    assert np.array_equal(*lengths) and np.array_equal(lengths[0], run.requests["num_output_tokens"])
    assert min(run.requests["arrival_time"].min(), run.steps["start_time"][0]) == 0
    assert run.steps["step"][0] >= 0 and (np.diff(run.steps["step"]) > 0).all()
    # An age does the same.
    aged = tmp_path / "aged"
    aged.mkdir()
    record(aged, overrides, Bounds(2**40, 1.0, "tokens", 16, b"k"), manifest)
    steps = read_run(aged).steps
    assert 0 < steps["end_time"][-1] - steps["start_time"][0] <= 1.0 or len(steps["step"]) < 40


def test_a_bound_goes_with_the_first_steps_and_its_file_with_it(tmp_path):
    """Written once with all steps, and once more when the oldest are gone."""
    strategy = ("allocator=paged_prefix", "scheduler=chunked", "workload.num_requests=120")
    manifest, folder = manifest_of(tmp_path, strategy), tmp_path / "served"
    folder.mkdir()
    config, _ = compose_cell([*CELL, *strategy])
    setup = build(config)
    pieces = Pieces(folder)
    bounds = Bounds(300_000, 1e9, "tokens", 16, b"k", 256)
    recorder = ServedRecorder(setup.parts.engine, Opening(manifest, bounds, 0.0), pieces)
    recorder._map._max_share, recorder._map._interval = None, 0.05  # whatever else this machine does
    told, had, steps = Told(recorder, 0), [], itertools.count(1)
    step = told.on_step

    def on_step(one):
        step(one)
        if next(steps) % 10 == 0:
            pieces.writer.write(is_end=False)
            had.append((folder / "reuse.parquet").exists())

    told.on_step = on_step
    setup.load.prepare(setup.parts.engine)
    drive(setup.parts.engine, setup.load.requests, told, after_step=setup.parts.simulator.after_step)
    recorder.close()
    assert True in had and not had[-1] and not pieces.said
    assert write_run_report(folder)["cache_share_of_optimum"] is None


@pytest.mark.parametrize("fault", ["of the log", "of another"])
def test_a_fault_ends_the_recording_and_nothing_else_and_no_access_is_kept(tmp_path, fault):
    config, _ = compose_cell([*CELL, "allocator=paged_prefix"])
    setup = build(config)
    (tmp_path / "served").mkdir()
    recorder = ServedRecorder(setup.parts.engine, Opening({}, LARGE, 0.0), Pieces(tmp_path / "served"))
    if fault == "of another":
        recorder._give_up(RuntimeError("no more"))
    recorder._log.rows = {}  # nobody is known

    class Quiet(Told):
        """Tells of steps alone."""

        def __init__(self):
            self.on_submit = self.on_rejected = lambda *args: None
            self.recorder, self.random = recorder, random.Random(0)

    setup.load.prepare(setup.parts.engine)
    requests = list(setup.load.requests)
    drive(setup.parts.engine, requests, Quiet(), after_step=setup.parts.simulator.after_step)
    assert not recorder.is_on and all(req.is_finished for req in requests)
    assert recorder._accesses.take() == []


def manifest_of(tmp_path, overrides):
    whole = tmp_path / "whole"
    whole.mkdir()
    config, choices = compose_cell([*CELL, *overrides, "workload.num_requests=2"])
    execute(config, whole, "whole", choices)
    return json.loads((whole / "manifest.json").read_text())


def replay(folder, path, *overrides):
    folder.mkdir()
    config, choices = compose_cell([*CELL[:4], *CELL[8:], *overrides, "workload=recorded", f"workload.path={path}"])
    return execute(config, folder, folder.name, choices)


@pytest.mark.parametrize("content", ["tokens", "hashes"])
def test_a_replay_finds_what_was_found_and_other_strategies_take_it(tmp_path, content):
    strategy = ("allocator=paged_prefix", "scheduler=chunked")
    manifest = manifest_of(tmp_path, strategy)
    served = tmp_path / "served"
    served.mkdir()
    record(served, strategy, Bounds(2**40, 1e9, content, 16, b"k", 256), manifest)
    assert json.loads((served / "manifest.json").read_text())["recording"]["has_bound"]
    again = replay(tmp_path / "again", served, *strategy)
    before = read_run(served).requests
    after = read_run(tmp_path / "again").requests
    assert list(after["request_id"]) == list(before["request_id"])
    for name in ("num_prompt_tokens", "num_output_tokens", "client_id", "num_cached_tokens",
                 "num_optimal_cached_tokens"):  # fmt: skip
        assert list(after[name]) == list(before[name]), name
    assert after["arrival_time"] == pytest.approx(before["arrival_time"] - before["arrival_time"][0])
    assert before["num_cached_tokens"].sum() > 0 and again["num_finished"] == 40
    tokens = pq.read_table(served / "requests.parquet").column("prompt_token_ids").to_pylist()
    assert all(one is None for one in tokens) is (content == "hashes")
    other = replay(tmp_path / "other", served, "allocator=contiguous", "scheduler=static")
    assert other["num_finished"] == 40 and not read_run(tmp_path / "other").requests["num_cached_tokens"].any()


def test_a_place_is_refused_in_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds files of something else"):
        recordings.check_recording_place(tmp_path)
    mine = tmp_path / "new"
    recordings.check_recording_place(mine)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    with recordings.claim(mine), pytest.raises(ConfigError, match="another server records there"):
        recordings.claim(mine, patience=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        recordings.check_recording_place(tmp_path / "file")


def test_an_earlier_recording_is_set_aside(tmp_path):
    manifest = manifest_of(tmp_path, ())
    for index in range(3):
        record(tmp_path, (f"workload.num_requests={3 + index}",), manifest=manifest)
    assert [read_run(folder).num_requests for folder in (tmp_path, tmp_path / "before")] == [5, 4]


def test_an_end_without_a_goodbye_is_told(tmp_path):
    """As of an engine that was killed: what it had handed on is there, and its open requests are."""
    manifest = manifest_of(tmp_path, ())
    pieces = Pieces(tmp_path)
    config, _ = compose_cell([*CELL, "workload.num_requests=6"])
    setup = build(config)
    recorder = ServedRecorder(setup.parts.engine, Opening(manifest, LARGE, 0.0), pieces)

    class Cut(Told):
        def on_step(self, step):
            self.recorder.on_step(step)
            if step.index == 20:
                self.recorder._flush()

    drive(setup.parts.engine, setup.load.requests, Cut(recorder, 0), after_step=setup.parts.simulator.after_step)
    pieces.close()
    recording = json.loads((tmp_path / "manifest.json").read_text())["recording"]
    assert recording["end"] == "cut off" and recording["num_open"] > 0
    run = read_run(tmp_path)
    assert run.num_steps == 21 and "abort" in run.requests["finish_reason"]
    assert np.array_equal(run.list_lengths("token_times"), run.requests["num_output_tokens"])
