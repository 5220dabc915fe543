"""Reuse distances against a count by their definition, against LRU at every size, and in files and reports."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from optimum_traces import prompts, with_locks

import kvarena
from kvarena.experiments.caching.optimum import Ask, Event, Grow, Leave, optimal_hits
from kvarena.experiments.caching.plain_replay import num_distinct, replay_policy
from kvarena.experiments.caching.reuse import reuse_stretches
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import load_run
from kvarena.reports.analysis.reuse import summarize_reuse
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.files import read_run


def by_block(stretches) -> list[tuple[int, int, float, int]]:
    """Row, place, seconds and blocks since, of each block that was asked for."""
    rows = []
    for row, start, num, seconds, since in zip(
        *(stretches[name].tolist() for name in ("row", "start", "num_blocks", "seconds", "num_since")), strict=True
    ):
        rows += [(row, start + i, seconds, since + i if since >= 0 else -1) for i in range(num)]
    return rows


def counted(events: list[Event]) -> list[tuple[int, int, float, int]]:
    """The same, by what the words say: every block's last holding, and which others were held at some time since."""
    owners: dict[int, list[int]] = {}
    left: dict[int, tuple[int, float]] = {}  # key -> number and time of the event in which nobody held it any more
    depth: dict[int, int] = {}
    found = []
    for number, event in enumerate(events):
        held = {key for keys in owners.values() for key in keys}
        if isinstance(event, Ask):
            keys = event.keys.tolist()
            depth |= {key: i for i, key in enumerate(keys)}
            for i, key in enumerate(keys[: event.num_wanted]):
                if key in held:
                    found.append((event.row, i, 0.0, -1))
                elif key not in left:
                    found.append((event.row, i, float("nan"), -1))
                else:
                    when, time = left[key]
                    later = {other for other, (at, _) in left.items()
                             if at > when or (at == when and depth[other] < depth[key])}  # fmt: skip
                    found.append((event.row, i, event.time - time, len((later | held) - {key})))
            owners[event.row] = keys
            for key in keys:
                left.pop(key, None)
        elif isinstance(event, Grow):
            keys = event.keys.tolist()
            depth |= {key: len(owners[event.row]) + i for i, key in enumerate(keys)}
            owners[event.row] = owners[event.row] + keys
            for key in keys:
                left.pop(key, None)
        elif isinstance(event, Leave):
            gone = owners.pop(event.row)
            still = {key for keys in owners.values() for key in keys}
            left |= {key: (number, event.time) for key in gone if key not in still}
    return found


def timed(rng: random.Random, events: list[Event]) -> list[Event]:
    """At different times, and with found blocks that are told of as they come."""
    times = itertools.accumulate(rng.random() for _ in events)
    return [event._replace(time=time) for event, time in zip(events, times, strict=True)]


def with_growth(rng: random.Random, trace: list[list[int]], num_blocks: int) -> list[Event]:
    """Some of what a request holds it has computed itself."""
    events: list[Event] = []
    for event in timed(rng, with_locks(rng, trace, num_blocks)):
        if isinstance(event, Ask) and len(event.keys) > 1 and rng.random() < 0.4:
            cut = rng.randint(1, len(event.keys) - 1)
            events.append(event._replace(keys=event.keys[:cut], num_wanted=min(event.num_wanted, cut)))
            events.append(Grow(event.row, event.keys[cut:]))
        else:
            events.append(event)
    return events


def test_distances_are_what_a_count_by_their_definition_gives() -> None:
    kinds = set()
    for seed in range(300):
        rng = random.Random(seed)
        num_blocks = rng.randint(3, 16)
        trace = prompts(rng, rng.randint(4, 25), rng.choice([2, 4, 8]), rng.choice([1, 2, 3]))
        events = with_growth(rng, trace, num_blocks)
        num_keys = num_distinct(trace)
        hits = optimal_hits(events, num_blocks, num_keys, len(trace))
        got, want = by_block(reuse_stretches(events, hits, num_keys)), counted(events)
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert mine[:2] == theirs[:2] and mine[3] == theirs[3], (seed, mine, theirs)
            assert mine[2] == pytest.approx(theirs[2], nan_ok=True)
            kinds.add("never" if np.isnan(mine[2]) else "in use" if mine[3] < 0 else "far" if mine[3] else "near")
    assert kinds == {"never", "in use", "near", "far"}


def test_the_share_up_to_a_distance_is_what_lru_of_that_size_finds() -> None:
    found = 0
    for seed in range(40):
        rng = random.Random(seed)
        trace = prompts(rng, rng.randint(5, 40), rng.choice([2, 4, 8]), rng.choice([1, 2, 3]))
        events: list[Event] = []
        for row, keys in enumerate(trace):
            events += [Ask(row, np.array(keys, dtype=np.int64), len(keys)), Leave(row)]
        hits = np.zeros(len(trace), dtype=np.int64)
        distances = np.array([since for *_, since in by_block(reuse_stretches(events, hits, num_distinct(trace)))])
        for size in range(1, num_distinct(trace) + 2):
            lru = int(replay_policy(trace, size, "lru")[0].sum())
            assert lru == int(((distances >= 0) & (distances < size)).sum()), (seed, size)
            found += lru
    assert found > 1000


# ---- of runs

CELL = [
    "model=opt-13b-shape", "engine.dtype=auto", "runner=simulated", "runner.profile=a100-40gb", "workload=multi_turn",
    "workload.num_requests=80", "arrival=trace", "kv_cache.num_slots=4000", "report.pages=false",
    "report.progress=false", "driver.record=summary", "scheduler=chunked", "allocator=paged_prefix",
    "allocator.eviction=lru",
]  # fmt: skip
CHOICES = {"allocator": "paged_prefix", "scheduler": "chunked", "workload": "multi_turn", "arrival": "trace"}


def run(folder: Path, *options: str) -> dict:
    folder.mkdir()
    router = dict(option.split("=") for option in options if option.startswith("router="))
    return execute(load_run([*CELL, *options]), folder, "cell", CHOICES | router)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    wanted = {
        "one": [], "warm": ["driver.cache=warm"], "tight": ["kv_cache.num_slots=2200"],
        "routed": ["router=round_robin", "router.num_replicas=2"],
    }  # fmt: skip
    place = tmp_path_factory.mktemp("cells")
    return {name: (place / name, run(place / name, *options)) for name, options in wanted.items()}


def test_what_was_found_and_what_could_be_add_up(cells) -> None:
    for name, (folder, summary) in cells.items():
        rows = pd.read_parquet(folder / "reuse.parquet")
        asked = rows.groupby("request")[["num_cached_tokens", "num_optimal_cached_tokens"]].sum()
        requests = pd.read_parquet(folder / "requests.parquet").loc[asked.index]
        assert (asked["num_cached_tokens"] == requests["num_cached_tokens"]).all(), name
        assert (asked["num_optimal_cached_tokens"] == requests["num_optimal_cached_tokens"]).all(), name
        assert (rows.groupby("request")["num_tokens"].sum() < requests["num_prompt_tokens"]).all()
        for rows in (summary["reuse"]["by_seconds"], summary["reuse"]["by_blocks"]):
            assert sum(row["num_cached_tokens"] for row in rows) == summary["num_cached_tokens"]
            assert sum(row["num_optimal_cached_tokens"] for row in rows) == summary["num_optimal_cached_tokens"]
            never = rows[-1]
            assert never["label"] == "never before" and not never["num_cached_tokens"]
            assert never["num_tokens"] or name == "warm"


def test_times_are_those_of_the_run(cells) -> None:
    folder = cells["one"][0]
    rows, requests = kvarena.load(folder).reuse, pd.read_parquet(folder / "requests.parquet")
    last = requests.groupby("client_id")["finish_time"].shift()  # of the turn before
    for number, row in rows[rows["num_since"].notna() & (rows["start"] > 100)].iterrows():
        # Behind the system prompt nobody but the session itself held them: since its turn before ended.
        gap = requests["admission_time"][row["request"]] - last[row["request"]]
        assert row["seconds"] == pytest.approx(gap, abs=0.1), number
    warm = pd.read_parquet(cells["warm"][0] / "reuse.parquet")
    first = requests["admission_time"][warm["request"]].to_numpy()
    # What was there before is taken to be left when the run began.
    assert warm["seconds"].notna().mean() > 0.9 and (warm["seconds"].fillna(0) <= first + 5).all()


def test_a_pool_too_small_finds_what_is_near(cells) -> None:
    rows = cells["tight"][1]["reuse"]["by_blocks"]
    rates = [row["num_cached_tokens"] / row["num_tokens"] for row in rows if row["num_tokens"]]
    near = [row for row in rows if row["up_to"] is not None and row["up_to"] <= 2200 / 16 / 4]
    assert all(row["num_cached_tokens"] == row["num_tokens"] for row in near) and rates[-1] == 0
    beyond = [row for row in rows if row["label"] in ("up to 2 pools (274)", "up to 4 pools (548)")]
    assert sum(row["num_tokens"] for row in beyond) and not sum(row["num_cached_tokens"] for row in beyond)
    assert sum(row["num_optimal_cached_tokens"] for row in beyond)  # MIN keeps some of that


def test_reports_have_the_tables_and_replicas_their_own(cells) -> None:
    folder, summary = cells["routed"]
    assert [sum(row["num_tokens"] for row in one) for one in summary["reuse"]["replicas"]] != [0, 0]
    each = summary["reuse"]["replicas"]
    for i, row in enumerate(summary["reuse"]["by_blocks"]):
        assert row["num_tokens"] == sum(one[i]["num_tokens"] for one in each)
    write_run_report(folder)
    text = (folder / "report.md").read_text()
    assert "how many different blocks were held since" in text and "replica 1" in text
    folder, summary = cells["one"]
    assert "replicas" not in summary["reuse"]
    (folder / "reuse.parquet").rename(folder / "gone")
    assert summarize_reuse(read_run(folder)) is None  # older run folders
    write_run_report(folder)
    assert "were held since" not in (folder / "report.md").read_text()
