"""The fast runner gives the tokens of the plain one: every lever on and off, under preemption and mixed batches."""

import numpy as np
import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool, run
from runner_driver import make_requests
from torch.nn.attention import SDPBackend

from kvarena.engine.attention import triton_backend
from kvarena.engine.attention.dense import DensePrompts
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.contract import ScheduledRequest, StepPlan
from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.kernels.step import StepBuffers
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.step_graphs import DECODE_FIELDS
from kvarena.engine.runner.torch_runner import TorchRunner

PROMPTS = random_prompts((5, 13, 1, 30, 17, 8))
NUM_TOKENS = 14
# 18 blocks of 4 hold four requests of up to 44 tokens only in part: some are preempted.
NUM_BLOCKS, BLOCK_SIZE = 18, 4


# Mistral's layers are Llama's, with a window.
@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.slow), "qwen3", "mistral"])
def model(request, tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def requests_of(kind):
    options = {
        "greedy": {},
        "sampled": {"temperature": 0.8, "seed": 5},
        "edited": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 3},
    }[kind]
    return make_requests(PROMPTS, NUM_TOKENS, **options)


def make_fused(model, *, fusions=True, late=True, mixed=False, max_num_seqs=4):
    pool = make_pool(model, NUM_BLOCKS, BLOCK_SIZE)
    backend = LateReference(pool) if late else ReferenceBackend(pool)
    decoder = fuse(model, TorchOps(), 128) if fusions else None
    options = {"max_num_seqs": max_num_seqs, "max_model_len": 128, "mixed_tokens": 16 if mixed else 0}
    return FusedRunner(model, pool, backend, decoder, **options)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "every"])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "edited"])
def test_same_tokens_with_every_lever(model, kind, every):
    """Half of the settings, in which any two of them meet with every kind; all of them in `make test-all`."""
    plain = TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))
    requests = requests_of(kind)
    expected = run(plain, requests, overlap=False)
    assert sum(req.num_preemptions for req in requests) > 0
    assert len({token for tokens in expected for token in tokens}) > 10
    for fusions in (False, True):
        for place, (late, mixed) in enumerate(((False, False), (True, False), (True, True))):
            turn = (fusions + place + ("greedy", "sampled", "edited").index(kind)) % 2 == 1
            for overlap in (False, True) if every else (turn,):
                runner = make_fused(model, fusions=fusions, late=late, mixed=mixed)
                got = run(runner, requests_of(kind), overlap=overlap)
                assert got == expected, (fusions, late, mixed, overlap)


def test_rows_are_reused_and_tables_follow(model):
    """More requests than rows, one after the other: a row's new owner never reads its predecessor's table."""
    runner = make_fused(model, max_num_seqs=2)
    plain = TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))
    requests = [make_requests(PROMPTS * 2, 6), make_requests(PROMPTS * 2, 6)]
    for i, req in enumerate(requests[1]):
        req.request_id = f"s{i}"
    expected = run(plain, requests[0], overlap=True, max_num_seqs=2)
    assert run(runner, requests[1], overlap=True, max_num_seqs=2) == expected
    with pytest.raises(EngineError, match="max_num_seqs"):
        runner._rows.of(Request(f"extra{i}", [1]) for i in range(5))


def test_the_library_gets_new_keys_and_values_without_reading_them_back(model, monkeypatch):
    plain = TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))
    prompts = random_prompts((7, 7))
    expected = run(plain, make_requests(prompts, 3), overlap=False)
    pool = make_pool(model, NUM_BLOCKS, BLOCK_SIZE)
    backend = TritonBackend(pool, model.module.config.num_attention_heads)
    backend._dense = DensePrompts(SDPBackend.MATH, min_length=7)  # cuDNN's where there is a GPU
    runner = FusedRunner(model, pool, backend, fuse(model, TorchOps(), 128), max_num_seqs=4, max_model_len=128)
    calls = []
    monkeypatch.setattr(backend._dense, "attend", lambda *args, of=backend._dense.attend: calls.append(1) or of(*args))
    monkeypatch.setattr(triton_backend, "gather_kv", lambda *args: pytest.fail("keys and values were read back"))
    runner.warm_up(0, 0)
    assert len(calls) == 1, "the library is there before its first step"
    calls.clear()
    assert run(runner, make_requests(prompts, 3), overlap=False) == expected
    assert not calls, "a shape goes to the library when it comes again"
    assert run(runner, make_requests(prompts, 3), overlap=False) == expected
    assert len(calls) == model.spec.num_layers


def test_warm_up_leaves_no_trace(model):
    runner = make_fused(model, mixed=True)
    assert runner.warm_up(4, 16) == 3 + 1  # batches of 1, 2 and 4; steps of up to 16 tokens
    assert runner.pool.data[:, :, BLOCK_SIZE:].abs().sum() == 0
    plain = TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))
    assert run(runner, requests_of("greedy"), overlap=True) == run(plain, requests_of("greedy"), overlap=False)


def test_padding_entries_do_not_touch_the_others(model):
    """Three requests run in a bucket of four: the fourth entry belongs to the null row, and block 0 gets its KV."""
    runner = make_fused(model)
    rows, graphs = runner._rows, runner._graphs
    before = rows.last_tokens.clone()
    fields = np.zeros((DECODE_FIELDS, 3), dtype=np.int32)
    fields[2] = 0, 1, 2
    fields[0] = 5
    for row in range(3):
        rows.tables.update(row, [1 + row])
    assert graphs.decode(fields).shape[0] == 3
    assert graphs._sent_fields[2, :4].tolist() == [0, 1, 2, rows.num_rows]
    assert torch.equal(before, rows.last_tokens)
    assert runner.pool.data[:, :, 4 * BLOCK_SIZE :].abs().sum() == 0


def test_a_missing_token_or_slot_is_an_error(model):
    class Table:
        block_size = BLOCK_SIZE

        def block_table(self, req):
            return [1, 2]

    runner = make_fused(model)
    req = Request("r", [1, 2, 3], SamplingParams(max_tokens=30))
    with pytest.raises(EngineError, match="neither host nor device has its token"):
        runner.execute(StepPlan(scheduled=[ScheduledRequest(req, 3, 1)], samples=[True]), Table())
    with pytest.raises(EngineError, match="block table holds 8 slots"):
        runner.execute(StepPlan(scheduled=[ScheduledRequest(req, 8, 1)], samples=[True]), Table())


def test_a_step_of_copies_alone_computes_nothing(model):
    runner = make_fused(model)
    assert runner.execute(StepPlan(preempted=[Request("r", [1])]), None).result().token_ids == []


def test_step_buffers_start_harmless():
    buffers = StepBuffers(5, 3, 2, torch.device("cpu"))
    assert buffers.seq_lens.tolist() == [1, 1, 1]
