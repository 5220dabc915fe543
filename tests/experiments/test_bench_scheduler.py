"""The scheduler benchmark runs, small; and the step it times is the one that it says."""

import json

from kvarena.allocators.prefix import CachingPool
from kvarena.experiments.benchmarks import scheduler as bench


def test_steps_of_both_engines_are_timed():
    ours = bench.bench_step("paged", "continuous", num_running=8, repeats=20)
    theirs = bench.bench_transformers(num_running=8, share_blocks=False, repeats=20)
    assert 0 < ours["min_ms"] <= ours["median_ms"] < 50
    assert 0 < theirs["min_ms"] <= theirs["median_ms"] < 50


def test_the_pools_size_does_not_matter():
    small = bench.bench_allocate_free("paged", 10**3, repeats=200)
    large = bench.bench_allocate_free("paged", 10**7, repeats=200)
    assert large["min_ms"] < 5 * small["min_ms"]


def test_a_match_covers_all_but_the_last_block():
    result = bench.bench_match_prefix("paged_prefix", 1024, repeats=3)
    assert result["hit_tokens"] == 1024 - bench.BLOCK_SIZE


def test_each_step_evicts_sixteen_blocks_of_a_full_pool(monkeypatch):
    monkeypatch.setattr(bench, "NUM_CACHED", 1500)
    evicted = []
    evict = CachingPool.evict
    monkeypatch.setattr(CachingPool, "evict", lambda pool, number: evicted.append(number) or evict(pool, number))
    step, prompt = bench.bench_evictions("radix", "lru", repeats=32)
    assert evicted.count(1) >= 32 * 16 - 16 and evicted.count(1024) >= 7
    assert step["median_ms"] > 0 and 0 < prompt["admission_us_a_block"] < prompt["us_a_block"]


def test_every_line_is_json(capsys, monkeypatch):
    for name in ("bench_step", "bench_transformers", "bench_allocate_free", "bench_match_prefix"):
        monkeypatch.setattr(bench, name, lambda *args: {"median_ms": 1.0, "min_ms": 1.0})
    monkeypatch.setattr(bench, "bench_evictions", lambda *args: ({"mean_ms": 1.0}, {"us_a_block": 1.0}))
    assert bench.main([]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    evicting = {"evicting_step", "evicting_prompt"}
    assert {line["bench"] for line in lines} == {
        "step",
        "transformers_step",
        "allocate_free",
        "match_prefix",
    } | evicting
    assert {"lru", "ageing", "arc"} <= {line["eviction"] for line in lines if line["bench"] in evicting}
    assert bench.main(["--evicting"]) == 0
    assert {json.loads(line)["bench"] for line in capsys.readouterr().out.splitlines()} == evicting
    assert {line["num_running"] for line in lines if line["bench"] == "step"} == {256, 1024}
