"""What tokens are picked by, when a runner keeps it: the pick is the best of it, whatever runs and samples."""

import numpy as np
import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool
from runner_driver import make_requests

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.streams import log_exponentials, stream_keys
from kvarena.experiments.recording.scores import ScoreLog
from kvarena.schedulers.chunked import ChunkedScheduler

PROMPTS = random_prompts((5, 13, 1, 30, 17, 8))
NUM_BLOCKS, BLOCK_SIZE = 18, 4  # some requests are preempted
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 5},
    "edited": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp("llama"), "llama"))


def make_runner(model, kind, num_scores):
    pool = make_pool(model, NUM_BLOCKS, BLOCK_SIZE)
    if kind == "plain":
        return TorchRunner(model, pool, num_scores=num_scores)
    return FusedRunner(model, pool, LateReference(pool), fuse(model, TorchOps(), 128), max_num_seqs=4,
                       max_model_len=128, mixed_tokens=16, num_scores=num_scores)  # fmt: skip


def record(model, kind, sampling, overlap, num_scores=4):
    runner = make_runner(model, kind, num_scores)
    allocator = PagedAllocator(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=128)
    scheduler = ChunkedScheduler(allocator, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16)
    requests, log = make_requests(PROMPTS, 14, **KINDS[sampling]), ScoreLog()
    engine = Engine(scheduler, allocator, runner, VirtualClock(), overlap=overlap)
    for step in run_to_completion(engine, requests):
        log.on_step(step)
    return requests, log


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_pick_is_the_best_score_of_every_token(model, sampling, overlap):
    found = {}
    for kind in ("plain", "fused"):
        requests, log = record(model, kind, sampling, overlap)
        for req in requests:
            best = [int(token_ids[0]) for token_ids in log._token_ids[req]]
            assert best == req.output_token_ids, (kind, req.request_id)
            assert all((np.diff(values) <= 0).all() for values in log._values[req])
        found[kind] = [np.concatenate(log._values[req]) for req in requests]
    for one, other in zip(*found.values(), strict=True):
        finite = np.isfinite(one)
        assert (finite == np.isfinite(other)).all()
        np.testing.assert_allclose(one[finite], other[finite], atol=1e-4)


def test_without_the_setting_nothing_is_kept(model):
    _, log = record(model, "fused", "sampled", overlap=True, num_scores=0)
    assert log._token_ids == {}


def test_scores_are_the_logits_and_the_race_without_an_offset():
    """A value that had its row's maximum taken off, or was normalised, could not be compared between two runs."""
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    requests = make_requests([[1], [2], [3]], 4, temperature=0.5, seed=7)
    requests[1].sampling = make_requests([[2]], 4)[0].sampling  # greedy
    batch = RequestRows(50, "cpu").batch(requests)
    sampled = Sampler(num_scores=5)(logits, batch)
    keys = torch.from_numpy(stream_keys(np.array([7, 7], dtype=np.uint64), np.array([0, 0])))
    wanted = logits.clone()
    wanted[[0, 2]] = logits[[0, 2]] / 0.5 - log_exponentials(keys, 50)
    best = wanted.topk(5)
    assert torch.equal(sampled.scores.token_ids.long(), best.indices)
    torch.testing.assert_close(sampled.scores.values.float(), best.values, atol=1e-5, rtol=0)
    assert sampled.token_ids.tolist() == best.indices[:, 0].tolist()
