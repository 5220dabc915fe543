"""On two GPUs: the tokens of one, by the sums that the ranks chose; every way of adding up is right there."""

import json

import pytest
import torch
from checkpoints import write_checkpoint
from parallel_cells import SAMPLINGS, of_model, requests, run

from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROOM = ("kv_cache.num_slots=2048", "scheduler.max_num_seqs=8", "engine.overlap=true", "engine.device=cuda")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def tokens(directory, shared, *overrides):
    """Of greedy requests and of those that draw; and what the engine says of itself."""
    found = []
    for sampling in ("greedy", "temperature", "top_p"):
        parts = build_engine(of_model(directory, *ROOM, *overrides), shared)
        asked = requests(**SAMPLINGS[sampling])
        run(parts.engine, asked)
        found.append([req.output_token_ids for req in asked])
    return found, parts.pool_facts["runner"]


@pytest.mark.parametrize("layout", [("parallel.tensor_parallel_size=2",), ("parallel.pipeline_parallel_size=2",)])
def test_two_gpus_give_the_tokens_of_one(tmp_path, layout):
    directory, shared = write_checkpoint(tmp_path, "llama", **SIZES), SharedParts()
    try:
        found, facts = tokens(directory, shared, *layout)
        print(json.dumps(facts.get("ranks")))
        alone, _ = tokens(directory, shared)
    finally:
        shared.clear()
    assert found == alone
    assert facts["fusions"] and facts["graphs"], facts
    if "tensor" in layout[0]:
        assert "all_reduce_left_out" not in facts["ranks"], facts["ranks"]
