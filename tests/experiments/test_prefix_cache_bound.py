"""The bound beside a run's hit rate: in files, summary and report; and the study of eviction policies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra.errors import InstantiationException

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell, load_run
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Verdict
from kvarena.reports.analysis.memory import step_spans
from kvarena.reports.analysis.prefix_cache import prompt_time, summarize_prefix_cache
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.files import read_run

CELL = [
    "model=opt-13b-shape", "engine.dtype=auto", "runner=simulated", "runner.profile=a100-40gb", "workload=multi_turn",
    "workload.num_requests=60", "arrival=poisson", "arrival.rate=4", "kv_cache.num_slots=4000", "report.pages=false",
    "report.progress=false", "driver.record=summary", "scheduler=chunked",
]  # fmt: skip
CHOICES = {"allocator": "paged_prefix", "scheduler": "chunked", "workload": "multi_turn", "arrival": "poisson"}


def run(folder: Path, *options: str) -> dict:
    folder.mkdir()
    return execute(load_run([*CELL, *options]), folder, "cell", CHOICES)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """The same load under several policies and both indexes."""
    wanted = {
        "lru": ["allocator=paged_prefix", "allocator.eviction=lru"],
        "radix": ["allocator=radix", "allocator.eviction=lru"],
        "ageing": ["allocator=paged_prefix"],
        "min": ["allocator=paged_prefix", "allocator.eviction=min"],
        "warm": ["allocator=paged_prefix", "allocator.eviction=lru", "driver.cache=warm"],
    }
    place = tmp_path_factory.mktemp("cells")
    return {name: (place / name, run(place / name, *options)) for name, options in wanted.items()}


def test_hits_stand_beside_their_bound(cells) -> None:
    for name, (folder, summary) in cells.items():
        found, most = summary["num_cached_tokens"], summary["num_optimal_cached_tokens"]
        assert 0 < found <= most < summary["num_prompt_tokens"], name
        assert summary["cache_share_of_optimum"] == pytest.approx(found / most)
        rows = pd.read_parquet(folder / "requests.parquet")
        assert rows["num_optimal_cached_tokens"].sum() == most
        assert (rows["num_optimal_cached_tokens"] < rows["num_prompt_tokens"]).all()
        policy = summary["pool"]["eviction"]
        assert policy["policy"] == {"radix": "lru", "warm": "lru"}.get(name, name) and policy["bytes"] >= 0
    shares = {name: summary["cache_share_of_optimum"] for name, (_, summary) in cells.items()}
    assert shares["lru"] < 0.95 and shares["min"] > shares["lru"]


def test_both_indexes_take_the_same_decisions_under_one_policy(cells) -> None:
    hashes = [pd.read_parquet(cells[name][0] / "steps.parquet")["decision_hash"] for name in ("lru", "radix")]
    assert hashes[0].equals(hashes[1])


def test_clients_share_the_bound_and_seconds_stand_beside_it(cells) -> None:
    folder, summary = cells["lru"]
    rows = summary["cache_by_client"]
    assert 2 < len(rows) <= 21 and all(row["client"].startswith("session-") for row in rows[:20])
    for key in ("num_cached_tokens", "num_optimal_cached_tokens", "num_prompt_tokens"):
        assert sum(row[key] for row in rows) == summary[key]
    assert 0 < summary["prompt_seconds_saved"] < summary["prompt_seconds"]
    files = read_run(folder)
    time = prompt_time(files, step_spans(files.steps))
    assert time is not None and time.token > 0
    # Within a factor of two of the operations of a token at the card's speed.
    assert 0.5 < time.seconds(np.array([300]))[0] / 300 / (2 * 13e9 / 312e12) < 2
    write_run_report(folder)
    text = (folder / "report.md").read_text()
    assert "Prefix cache" in text and "Belady's MIN" in text and "session-" in text


def test_a_policy_by_kinds_says_how_many_there_were(cells, tmp_path) -> None:
    options = ["allocator=paged_prefix", "allocator.eviction=workload"]
    summary = run(tmp_path / "turns", *options)
    kinds = pd.read_parquet(tmp_path / "turns" / "requests.parquet")["kind"]
    assert {"turn-1", "turn-5"} <= set(kinds)
    assert summary["pool"]["eviction"]["num_kinds"] == kinds.nunique()
    assert not any("kind of request" in line for line in summary["notices"])
    write_run_report(tmp_path / "turns")
    assert "kinds of request" in (tmp_path / "turns" / "report.md").read_text()
    # A replay has them, too.
    run(tmp_path / "full", *options, "driver.record=full")
    replayed = [option for option in CELL if not option.startswith(("workload", "arrival"))]
    replayed += [*options, "workload=recorded", f"workload.path={tmp_path / 'full'}"]
    (tmp_path / "again").mkdir()
    again = execute(load_run(replayed), tmp_path / "again", "cell", CHOICES | {"workload": "recorded"})
    assert again["pool"]["eviction"]["num_kinds"] == kinds.nunique()
    summary = run(tmp_path / "none", *options, "workload=shared_prefix")
    assert summary["pool"]["eviction"]["num_kinds"] == 1
    assert any("one kind of request at most" in line for line in summary["notices"])
    assert cells["lru"][1]["pool"]["eviction"]["num_kinds"] is None


def test_older_files_have_no_bound(cells, tmp_path) -> None:
    files = read_run(cells["lru"][0])
    del files.requests["num_optimal_cached_tokens"]
    summary = summarize_prefix_cache(files, step_spans(files.steps))
    assert summary["num_optimal_cached_tokens"] is None and summary["cache_by_client"] == []
    files.requests["num_optimal_cached_tokens"] = np.full(files.num_requests, np.nan)
    assert summarize_prefix_cache(files, step_spans(files.steps))["cache_share_of_optimum"] is None


def test_a_policy_that_needs_the_future_serves_nobody(tmp_path) -> None:
    config = compose_cell(["mode=serve", "allocator=paged_prefix", "allocator.eviction=min", "model=demo"])[0]
    with pytest.raises(ConfigError, match="nobody knows what a server will be asked, and allocator"):
        build_engine(config, whole_context=True)
    routed = load_run([*CELL, "allocator=radix", "allocator.eviction=min", "router=round_robin"])
    with pytest.raises(ConfigError, match="a replica is sent a part of the requests"):
        execute(routed, tmp_path, "cell", CHOICES)


def test_the_study_has_every_policy_beside_the_optimum(tmp_path) -> None:
    """Documents that come back between one-time prompts: policies that count uses find more than LRU does."""
    rng, lines = np.random.default_rng(0), []
    for number in range(120):
        document = int(rng.zipf(1.5)) if number % 3 == 0 else 1000 + number
        ids = [1, 100 + 10 * document, 101 + 10 * document]
        lines.append({"timestamp": 900 * number, "input_length": 1500, "output_length": 4, "hash_ids": ids})
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    options = [
        "experiment=cache_policies", f"study.paths=[{trace}]", "study.sizes=[8192]", "study.shares=[0.2]",
        "~study.drawn.agent_loop", "~study.drawn.multi_turn",
        "study.drawn={shared_prefix: ['workload.num_requests=60','workload.skew=1','workload.num_prefixes=20']}",
        "study.policies=[lru,ageing]", "study.engine_requests=40", "study.engine_slots=[20000]", "study.seeds=[0,1]",
        "driver.probe=false", "report.progress=false",
    ]  # fmt: skip
    study = instantiate(compose_cell(options)[0].study)
    findings = study.run(CellRunner(options, tmp_path / "study"))
    values = {claim.quantity: claim for claim in findings.claims}
    assert values["trace, 0.008192 M tokens (16 blocks), lru: hits"].ours > 0
    assert all(claim.verdict is Verdict.PASSES for claim in findings.claims if "MIN less" in claim.quantity)
    assert values["engine, 20,000 tokens, ageing: share of MIN"].ours <= 100
    assert values["engine, 20,000 tokens, lru: p99 TTFT"].low is not None
    assert [chart.name for chart in findings.charts] == ["hits_trace", "hits_shared_prefix"]
    with pytest.raises(InstantiationException, match="must have lru"):
        instantiate(compose_cell([*options, "study.policies=[min]"])[0].study)
    with pytest.raises(InstantiationException, match="are empty"):
        instantiate(compose_cell([*options[:1], "study.drawn=null"])[0].study)


def test_hits_are_told_apart_by_level(tmp_path) -> None:
    summary = run(tmp_path / "levels", "allocator=paged_prefix", "allocator.eviction=lru", "kv_cache.host_gib=8")
    rows = pd.read_parquet(tmp_path / "levels" / "requests.parquet")
    loaded = int(rows["num_loaded_tokens"].sum())
    assert 0 < loaded == summary["num_loaded_tokens"] < summary["num_cached_tokens"]
    assert (rows["num_loaded_tokens"] <= rows["num_cached_tokens"]).all()
    assert summary["num_cached_tokens"] <= summary["num_optimal_cached_tokens"]
    write_run_report(tmp_path / "levels")
    text = (tmp_path / "levels" / "report.md").read_text()
    assert f"{loaded:,} of them from host memory" in text and "| in host memory |" in text
    summary = run(tmp_path / "none", "allocator=paged_prefix", "allocator.eviction=lru")
    write_run_report(tmp_path / "none")
    text = (tmp_path / "none" / "report.md").read_text()
    assert summary["num_loaded_tokens"] == 0 and "from host memory" not in text and "| in host memory |" not in text
