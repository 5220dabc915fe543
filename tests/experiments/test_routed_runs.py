"""Several replicas behind a router are one run: on one clock, with the files, summaries and reports of any run."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.routing import Router
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.load.turns import RealTurns, TaskClock, VirtualTurns
from kvarena.experiments.recording.interruption import Interrupted
from kvarena.experiments.settings.compose import compose_cell
from kvarena.reports.reading.files import read_run

ROUTERS = ("round_robin", "least_kv", "power_of_two", "prefix_affinity", "kv_exact")
CELL = [
    "runner=simulated", "model=llama-3.1-8b-shape", "runner.profile=h200", "kv_cache.num_slots=20000",
    "allocator=paged_prefix", "scheduler=chunked", "workload=multi_turn", "workload.num_requests=40",
    "report.progress=false", "report.pages=false",
]  # fmt: skip
FAST = ("arrival=trace", "arrival.speed=20")


def run(folder: Path, *overrides: str) -> dict:
    folder.mkdir(parents=True)
    arrival = () if any(one.startswith("arrival=") for one in overrides) else FAST
    config, choices = compose_cell([*CELL, *arrival, *overrides])
    return execute(config, folder, " x ".join(choices[g] for g in ("allocator", "scheduler")), choices)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(folder)


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("routed") / "run"
    return folder, run(folder, "router=kv_exact", "router.num_replicas=3", "slo=chat")


@pytest.mark.parametrize("router", ["round_robin", "kv_exact"])
def test_one_replica_is_the_engine_itself(router: str, plain: tuple[Path, dict], tmp_path: Path):
    """The driver of several does to one replica what the driver of one engine does, to the digit."""
    folder = tmp_path / "one"
    summary = run(folder, f"router={router}", "router.num_replicas=1", "engine.overlap=true")
    other = run(tmp_path / "alone", "engine.overlap=true")
    for ours, theirs, base in ((folder, tmp_path / "alone", other),):
        for file in ("requests.parquet", "steps.parquet"):
            one, two = pq.read_table(ours / file), pq.read_table(theirs / file)
            assert one.drop_columns([n for n in one.column_names if n not in two.column_names]).equals(two)
        assert summary["output_tokens_per_second"] == base["output_tokens_per_second"]
    assert summary["routing"]["imbalance"] == 1 and plain[1]["routing"] is None and plain[1]["imbalance"] is None


def test_every_request_is_one_replica_s_and_rows_are_in_order_of_arrival(routed: tuple[Path, dict]):
    folder, summary = routed
    requests, routing = (pq.read_table(folder / name) for name in ("requests.parquet", "routing.parquet"))
    arrivals = requests.column("arrival_time").to_numpy()
    assert (np.diff(arrivals) >= 0).all() and routing.num_rows == 40
    assert np.allclose(routing.column("time").to_numpy(), arrivals)
    replicas = routing.column("replica").to_numpy()
    rows = summary["routing"]["replicas"]
    assert [one["num_requests"] for one in rows] == np.bincount(replicas, minlength=3).tolist()
    assert sum(one["num_output_tokens"] for one in rows) == summary["num_output_tokens"]
    steps = pq.read_table(folder / "steps.parquet")
    assert (np.diff(steps.column("start_time").to_numpy()) >= 0).all()
    assert sum(one["num_computed_tokens"] for one in rows) == sum(steps.column("num_new_tokens").to_pylist())
    computed = [one["num_computed_tokens"] for one in rows]
    assert summary["imbalance"] == pytest.approx(max(computed) / np.mean(computed))


def test_replicas_run_side_by_side_on_one_clock(routed: tuple[Path, dict]):
    steps = read_run(routed[0]).steps
    for number in range(3):
        mine = steps["replica"] == number
        assert (steps["step"][mine] == np.arange(mine.sum())).all()
        assert (steps["start_time"][mine][1:] >= steps["end_time"][mine][:-1]).all()
    order = np.argsort(steps["start_time"])
    overlaps = steps["start_time"][order][1:] < steps["end_time"][order][:-1]
    assert overlaps.any()
    summary = routed[1]
    assert summary["busy_seconds"] == pytest.approx(float((steps["end_time"] - steps["start_time"]).sum()))
    assert summary["busy_share"] == pytest.approx(summary["busy_seconds"] / summary["duration_seconds"] / 3)


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_serves_all_and_does_it_again_alike(router: str, tmp_path: Path):
    overrides = (f"router={router}", "router.num_replicas=2", "workload.num_requests=16", "driver.record=summary")
    first, again = (run(tmp_path / name, *overrides) for name in ("first", "again"))
    assert first["num_finished"] == 16 and first["strategy"]["router"] == router
    for file in ("routing.parquet", "steps.parquet"):
        assert pq.read_table(tmp_path / "first" / file).equals(pq.read_table(tmp_path / "again" / file))
    assert again["e2e_seconds"] == first["e2e_seconds"]


def test_users_who_wait_send_again_when_a_replica_has_answered(tmp_path: Path):
    summary = run(
        tmp_path / "run", "router=least_kv", "workload=uniform", "workload.num_requests=12", "arrival=closed_loop",
        "arrival.num_users=3",
    )  # fmt: skip
    run_files = read_run(tmp_path / "run")
    open_at = [
        int(((run_files.requests["submit_time"] <= t) & (run_files.requests["finish_time"] > t)).sum())
        for t in run_files.requests["submit_time"]
    ]
    assert summary["num_finished"] == 12 and max(open_at) <= 3


def test_samples_of_one_prompt_go_to_one_replica(tmp_path: Path):
    overrides = ["sampling.n=3", "router=round_robin", "workload=uniform", "workload.num_requests=5"]
    run(tmp_path / "run", *overrides, "arrival=all_at_once", "allocator=paged")
    replicas = pq.read_table(tmp_path / "run" / "routing.parquet").column("replica").to_numpy()
    assert replicas.reshape(5, 3).tolist() == [[n % 2] * 3 for n in range(5)]


def test_nothing_recorded_leaves_totals(tmp_path: Path):
    summary = run(tmp_path / "run", "router=least_kv", "driver.record=none", "workload.num_requests=8")
    assert summary["num_finished"] == 8 and summary["output_tokens_per_second"] > 0
    assert not (tmp_path / "run" / "routing.parquet").exists()


def test_the_report_has_a_row_a_replica(routed: tuple[Path, dict]):
    from kvarena.reports.pages.run_report import write_run_report

    write_run_report(routed[0])
    text = (routed[0] / "report.md").read_text()
    assert "## Replicas" in text and "kv_exact over 3 replicas" in text and "3 pools, each of 20,000 slots" in text
    assert "goodput" in text


def test_the_trace_has_a_process_a_replica(routed: tuple[Path, dict], tmp_path: Path):
    from kvarena.reports.drawing.chrome_trace import trace_events

    events = list(trace_events(read_run(routed[0])))
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [named[pid].split(":")[0] for pid in (1, 2, 3, 4)] == ["replica 0", "requests", "replica 1", "replica 2"]
    for pid in (1, 3, 4):  # steps of one replica follow one another
        spans = [event for event in events if event["pid"] == pid and event["name"].startswith("step ")]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(spans))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("router.num_replicas=4",),
            "router.num_replicas=4 must be 1 without a router; choose one (router=round_robin",
        ),
        (("router=least_kv", "driver.cache=warm"), "driver.cache=warm fills one cache, and router.num_replicas=2"),
        (("router=least_kv", "router.num_replicas=0"), "router.num_replicas=0 must be an integer in [1, 1024]"),
    ],
)
def test_what_does_not_fit_is_a_line(overrides: tuple[str, ...], words: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "run", *overrides)
    assert words in str(error.value)


class Lost(Router):
    """Names a replica that there is not."""

    def route(self, req, replicas) -> int:
        return 7


def test_a_router_that_names_no_replica_ends_the_run_in_a_line(tmp_path: Path):
    import kvarena

    with pytest.raises(EngineError, match="the router named replica 7 of 2; they count from 0"):
        kvarena.run("paged", router=Lost, overrides=[one for one in CELL if "allocator" not in one], folder=tmp_path)


def test_a_caller_s_router_is_a_choice_as_any_other(tmp_path: Path):
    import kvarena

    class Last(Router):
        def route(self, req, replicas) -> int:
            return len(replicas) - 1

    overrides = [one for one in CELL if "allocator" not in one and "scheduler" not in one]
    result = kvarena.run("paged", router=Last, overrides=overrides, folder=tmp_path)
    assert result.summary.strategy["router"] == "Last"
    assert [one["num_requests"] for one in result.summary.routing["replicas"]] == [0, 40]


def test_a_grid_of_allocators_schedulers_and_routers_is_one_comparison(tmp_path: Path):
    import kvarena

    rest = [one for one in CELL if "allocator" not in one and "scheduler" not in one]
    compared = kvarena.sweep(
        ["paged_prefix", "radix"], ["chunked"], router=["round_robin", "kv_exact"],
        overrides=[*rest, "workload.num_requests=30", "slo=chat", "report.kv_map=false"], folder=tmp_path,
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["cells"]) == 4 and not compared.failed
    assert "radix × chunked × kv_exact" in {cell["label"] for cell in summary["cells"]}
    assert all(cell["imbalance"] >= 1 and cell["cached_prompt_share"] is not None for cell in summary["cells"])
    text = (tmp_path / "report.md").read_text()
    assert "hit rate" in text and "imbalance" in text and "goodput req/s" in text


def test_a_task_s_failure_ends_all_tasks():
    for turns in (VirtualTurns(3), RealTurns(3)):
        ended = []

        def wait(number: int, turns=turns, ended=ended) -> None:
            try:
                TaskClock(turns, number).wait_until(1e6)
            finally:
                ended.append(number)

        def fail(turns=turns) -> None:
            TaskClock(turns, 2).sleep_until(0.01)
            raise EngineError("the device is lost")

        with pytest.raises(EngineError, match="the device is lost"):
            turns.run([lambda: wait(0), lambda: wait(1), fail])
        assert sorted(ended) == [0, 1]


def test_an_interrupted_run_keeps_what_the_replicas_had(tmp_path: Path, monkeypatch):
    """Requests that were on their way to a replica are in no file."""
    steps = iter(range(10_000))

    def interrupt(self, recorder) -> None:
        if next(steps) == 30:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("kvarena.experiments.jobs.output.Progress.__call__", interrupt)
    with pytest.raises(Interrupted, match="requests had ended and are kept"):
        run(tmp_path / "run", "router=round_robin", "arrival=all_at_once", "workload=uniform")
    requests, routing = (pq.read_table(tmp_path / "run" / name) for name in ("requests.parquet", "routing.parquet"))
    assert requests.num_rows == routing.num_rows
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["run"]["interrupted"]
    assert summary["num_submitted"] == requests.num_rows and summary["num_ended"] < 40
    assert not (tmp_path / "run" / "cell.json").exists()
