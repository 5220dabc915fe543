"""Models with experts give transformers' greedy tokens in every allocator x scheduler that loses no KV, in float32."""

import pytest

from kvarena.engine.models.configs import quiet_transformers
from kvarena.experiments.correctness.model_classes import (
    MAX_LEN,
    NUM_TOKENS,
    Checkpoint,
    Setting,
    prompts,
    write_small,
)
from kvarena.experiments.correctness.reference import greedy_reference
from kvarena.experiments.correctness.small_configs import small_config
from kvarena.experiments.settings.strategies import strategy_names

ALLOCATORS, SCHEDULERS = strategy_names("allocator"), strategy_names("scheduler")
# Regions take the longest request's whole context; all others are so tight that requests wait or are preempted.
ROOM = {name: 4 * MAX_LEN for name in ALLOCATORS if name.startswith(("contiguous", "orca"))}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(request.param))
    with quiet_transformers():
        write_small(small_config(request.param), folder)
        return Checkpoint(folder), greedy_reference(folder, prompts(), NUM_TOKENS)


def cells():
    """Each allocator and each scheduler once or twice; all pairs in `make test-all`."""
    for i, allocator in enumerate(ALLOCATORS):
        for j, scheduler in enumerate(SCHEDULERS):
            quick = i % len(SCHEDULERS) == j
            yield pytest.param(allocator, scheduler, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("allocator", "scheduler"), cells())
def test_greedy_tokens_equal_transformers(checkpoint, allocator, scheduler):
    model, expected = checkpoint
    requests = model.run(Setting(allocator, scheduler, (f"kv_cache.num_slots={ROOM.get(allocator, 96)}",)))
    assert [req.output_token_ids for req in requests] == expected
