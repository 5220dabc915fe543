"""On a GPU: CUDA graphs, overlap, fusions and mixed batches leave greedy tokens as they are."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]


def test_same_tokens_whatever_the_levers():
    from kvarena.experiments.benchmarks.engine_checks import check_tokens

    line = check_tokens()
    assert all(line["same"].values()), line["same"]
    assert line["distinct"] > 10


def test_bfloat16_logits_follow_the_modules():
    from kvarena.experiments.benchmarks.engine_checks import check_logits
    from kvarena.experiments.gpu.engines import Engines

    line = check_logits(Engines("tiny", "engine.dtype=bfloat16", "kv_cache.num_slots=4096"))
    assert "error" not in line, line
