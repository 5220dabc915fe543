"""What a warm-up captures: the steps that settings, pool and load leave possible, and no others."""

from types import SimpleNamespace

import pytest

from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.building.warm_up import Reach
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.strategies import build_allocator


def requests(count=100, prompt=20, output=12):
    return [Request(f"r{i}", [1] * (prompt + i), SamplingParams(max_tokens=output)) for i in range(count)]


def reach(*overrides, load=(), users=None, allocator="paged", num_blocks=1000, **options):
    made = build_allocator(allocator, num_blocks=num_blocks, max_model_len=256, **options)
    parts = SimpleNamespace(engine=SimpleNamespace(allocator=made))
    return Reach.of(load_run([f"allocator={allocator}", *overrides]), parts, load, users)


def test_nobody_knows_a_server_s_load():
    assert reach() == (256, 2048)
    assert reach("scheduler.max_num_seqs=40", "scheduler.max_num_batched_tokens=512") == (40, 512)
    assert reach(num_blocks=100) == (100, 2048)


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({"load": requests(100)}, 100),
        ({"load": requests(100), "users": 7}, 7),
        # Prompts of 20 tokens or more are two blocks each, if nobody shares them.
        ({"load": requests(100), "num_blocks": 60}, 30),
        ({"load": requests(100), "num_blocks": 60, "allocator": "paged_prefix"}, 60),
        ({"load": requests(100), "num_blocks": 60, "sliding_window": 17}, 60),
        ({"load": requests(100), "num_blocks": 64, "allocator": "contiguous"}, 32),
    ],
)
def test_rows_are_bounded_by_load_and_pool(more, rows):
    assert reach(**more).rows == rows


def test_samples_share_their_prompt():
    assert reach("sampling.n=2", load=requests(100), num_blocks=60).rows == 60


def test_tokens_are_bounded_by_what_a_preemption_makes_all_compute_again():
    assert reach(load=requests(3)) == (3, 3 * (22 + 12))
    assert reach(load=requests(300)) == (256, 2048)
