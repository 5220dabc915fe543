"""Hit rates on a small trace in Mooncake's format, and the endless cache that they are held against."""

import json
import random

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.experiments.workloads.mooncake import MooncakeWorkload


@pytest.fixture
def trace(tmp_path):
    """Conversations of five turns, whose prompts grow by a block and a half."""
    rng = random.Random(0)
    rows, next_id = [], 0
    for _ in range(12):
        start, chain = rng.randrange(60_000), []
        for turn in range(1, 6):
            length = 768 * turn
            whole = length // 512
            fresh = range(next_id, next_id + whole - len(chain) + 1)
            next_id = fresh.stop
            chain = [*chain, *fresh][:whole]
            ids = [*chain, *([next_id] if length % 512 else [])]
            next_id += 1
            rows.append({
                "timestamp": start + 20_000 * turn, "input_length": length, "output_length": 8, "hash_ids": ids,
            })  # fmt: skip
    rows.sort(key=lambda row: row["timestamp"])
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def workload(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return MooncakeWorkload(path=str(path), seed=0, vocab_size=100)


def row(length, ids):
    return {"timestamp": 0, "input_length": length, "output_length": 1, "hash_ids": ids}


def test_the_endless_cache_counts_whole_blocks_of_a_prefix(tmp_path):
    path = tmp_path / "t.jsonl"
    # Nothing; two blocks of 512; the first alone, since the second differs; all but the last token of the prompt.
    rows = [row(1024, [1, 2]), row(1500, [1, 2, 3]), row(1024, [1, 9]), row(1024, [1, 2])]
    assert workload(path, rows).token_hits(16) == (0 + 1024 + 512 + 1008, 4572)
    # Of a partial block, as much as was there.
    assert workload(path, [row(600, [1, 2]), row(1024, [1, 2])]).token_hits(16) == (592, 1624)


def test_hits_grow_with_the_cache_to_the_endless_one(tmp_path, trace):
    small = (f"study.path={trace}", "study.num_requests=60", "study.block_size=16")
    findings, _ = run_study(
        tmp_path / "right", "experiment=radix_hits", *small, "study.num_slots=[8000]", "study.beyond_slots=[200000]"
    )
    assert {claim.kind for claim in findings.claims} == {Kind.OURS, Kind.CHECK}  # nothing here is a published number
    assert [claim.verdict for claim in findings.claims] == [*[Verdict.MEASURED] * 5, *[Verdict.PASSES] * 6]
    assert "the card holds (8,000 tokens, 1 GB)" in findings.headline
    assert findings.claims[2].note.endswith("more than the card holds")
    for series in findings.charts[0].series:
        assert series.y[0] < series.y[1] - 5
    wrong, _ = run_study(
        tmp_path / "wrong", "experiment=radix_hits", *small, "study.num_slots=[5000]", "study.beyond_slots=[8000]"
    )
    assert wrong.claims[5].verdict is Verdict.FAILS


def test_a_path_is_needed(tmp_path):
    with pytest.raises(Exception, match="is empty; give a Mooncake trace") as error:
        run_study(tmp_path, "experiment=radix_hits")
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_requests_that_are_too_long_are_left_out_of_the_endless_cache_too(tmp_path, trace):
    lines = trace.read_text().splitlines()
    long = {"timestamp": 0, "input_length": 140_000, "output_length": 8, "hash_ids": list(range(10**6, 10**6 + 274))}
    trace.write_text("\n".join([json.dumps(long), json.dumps(long), *lines]) + "\n")
    small = (
        f"study.path={trace}",
        "study.num_requests=60",
        "study.block_size=16",
        "study.num_slots=[8000]",
        "study.beyond_slots=[200000]",
    )
    findings, _ = run_study(tmp_path / "long", "experiment=radix_hits", *small)
    assert [claim.verdict for claim in findings.claims if claim.kind is Kind.CHECK] == [Verdict.PASSES] * 6
