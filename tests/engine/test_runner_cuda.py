"""The torch runner on a GPU: the same tokens as on the host, swaps through pinned memory, the memory profile."""

import pytest
import torch
from attention_cases import dense_attention, make_case, run_backend
from checkpoints import random_prompts, write_checkpoint
from runner_driver import generate, make_requests

from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.contract import BlockCopy, CopyKind
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.models import load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.runner.profile import available_kv_bytes
from kvarena.experiments.correctness.reference import greedy_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = random_prompts((5, 13, 1, 30))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, device="cuda")


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_tokens_equal_transformers(model, directory, overlap):
    assert model.device.type == "cuda"
    outcome = generate(model, make_requests(PROMPTS, 10), block_size=4, chunk=6, overlap=overlap)
    assert outcome.tokens == greedy_reference(directory, PROMPTS, 10)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 24}, {"softcap": 5.0}])
def test_reference_attention_equals_dense(options):
    case = make_case([(900, 1), (400, 1), (0, 40), (12, 30)], device="cuda")
    got = run_backend(ReferenceBackend(case.pool), case, scale=0.3, **options)
    assert (got.double().cpu() - dense_attention(case, scale=0.3, **options)).abs().max() < 1e-4


def test_swapped_blocks_come_back():
    pool = KVPool(
        num_blocks=8, block_size=4, num_layers=2, num_kv_heads=2, head_dim=8, device="cuda", num_swap_blocks=3
    )
    assert pool.host is not None
    assert pool.host.data.is_pinned()
    pool.data.normal_()
    before = pool.data.clone()
    pool.apply_copies([BlockCopy(CopyKind.SWAP_OUT, 2, 1), BlockCopy(CopyKind.SWAP_OUT, 5, 0)])
    pool.data.zero_()
    pool.apply_copies([BlockCopy(CopyKind.SWAP_IN, 1, 7), BlockCopy(CopyKind.SWAP_IN, 0, 5)])
    for source, destination in ((2, 7), (5, 5)):
        for layer in range(2):
            expected = before[:, layer].view(2, 9, 4, 2, 8)[:, source]
            assert torch.equal(torch.stack(pool.blocks(layer))[:, destination], expected)


def test_a_share_is_this_engines_own(model, monkeypatch):
    block_bytes = 16 * model.spec.kv_bytes_per_token
    free, total = torch.cuda.mem_get_info()
    before = total - free - torch.cuda.memory_reserved()
    options = {"max_num_batched_tokens": 2048, "max_num_seqs": 16, "block_bytes": block_bytes, "in_use_before": before}
    options["max_model_len"] = 2048
    most = available_kv_bytes(model, gpu_memory_utilization=0.8, **options)
    half = available_kv_bytes(model, gpu_memory_utilization=0.4, **options)
    assert 0 < half < most < 0.8 * total
    assert most - half == pytest.approx(0.4 * total, rel=0.01)
    with pytest.raises(ConfigError, match=r"one block of KV .*; raise it to at least 0\.0"):
        available_kv_bytes(model, gpu_memory_utilization=1e-6, **options)

    def does_not_fit(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("kvarena.engine.runner.profile.run_largest_step", does_not_fit)
    with pytest.raises(EngineError, match=r"2.00 GiB were asked for and .*; lower scheduler\.max_num_batched_tokens"):
        available_kv_bytes(model, gpu_memory_utilization=0.9, **options)
