"""Masks that there was no time for: their rows' tokens are void, are sampled again, and no token changes."""

from __future__ import annotations

import functools
import time
from itertools import product

import numpy as np
import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from runner_driver import make_requests, make_runner

from kvarena.engine.clock import WallClock
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import load_model
from kvarena.engine.runner import torch_runner
from kvarena.engine.runner.constraints import MASK_SECONDS, allowed_tokens, unpacked
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler

PROMPTS = random_prompts((5, 13, 1, 30, 22, 9))
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp("llama")))


class Window:
    """Allows 20 token ids that change with every token; takes processor time when told to."""

    def __init__(self):
        self.num_late, self.at, self.num_fills = 0, 0, 0

    failure = ""
    is_free = False

    def fill(self, bitmask):
        self.num_fills += 1
        bitmask[:] = 0
        for token in range(10 + self.at % 40, 30 + self.at % 40):
            bitmask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token_id):
        assert 10 + self.at % 40 <= token_id < 30 + self.at % 40
        self.at += token_id


ALLOCATORS, SCHEDULERS = ("paged", "paged_prefix", "contiguous"), ("continuous", "chunked", "static", "fair")
# Every scheduler with and without overlap, the allocators in turn; the whole grid with the slow tests.
SOME = [
    (ALLOCATORS[(i + overlap) % 3], name, overlap) for i, name in enumerate(SCHEDULERS) for overlap in (False, True)
]
REST = [one for one in product(ALLOCATORS, SCHEDULERS, (False, True)) if one not in SOME]


@pytest.mark.parametrize(
    ("allocator", "scheduler", "overlap"), [*SOME, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)]
)
def test_masks_that_come_late_change_no_token(model, allocator, scheduler, overlap, monkeypatch):
    """With time for one mask a step, five of six constrained requests are put off in every step, some at the end of
    their prompt; each gets its turn and the tokens that it gets with time for all."""

    def run(seconds):
        monkeypatch.setattr(torch_runner, "allowed_tokens", functools.partial(allowed_tokens, seconds=seconds))
        pool = build_allocator(allocator, num_blocks=40, block_size=4, max_model_len=64)
        requests = make_requests(PROMPTS, NUM_TOKENS, temperature=1.0, seed=7, repetition_penalty=1.2, logprobs=2)
        requests += make_requests(PROMPTS[:1], NUM_TOKENS)
        requests[-1].request_id = "free"
        for req in requests[:-1]:
            req.constraint = Window()
        policy = build_scheduler(scheduler, pool, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32)
        engine = Engine(policy, pool, make_runner(model, 40, 4), WallClock(), overlap=overlap, ledger=MemoryLedger())
        outputs = run_to_completion(engine, requests)
        assert all(len(req.output_token_ids) == NUM_TOKENS for req in requests)
        assert all(req.constraint.num_fills == NUM_TOKENS for req in requests[:-1])
        return [req.output_token_ids for req in requests], len(outputs)

    (tokens, num_steps), (late_tokens, num_late_steps) = run(60.0), run(0.0)
    assert late_tokens == tokens
    assert num_late_steps > 1.5 * num_steps


class Slow(Window):
    """Costs a fifth of what the masks of a step may cost."""

    def fill(self, bitmask):
        super().fill(bitmask)
        end = time.thread_time() + MASK_SECONDS / 5
        while time.thread_time() < end:
            pass


def test_the_masks_of_a_step_cost_a_bounded_time_and_take_turns():
    requests = make_requests([[1]] * 20, 4)
    for req in requests:
        req.constraint = Slow()
    for _ in range(5):
        start = time.thread_time()
        mask = allowed_tokens(requests, 128, torch.device("cpu"))
        assert time.thread_time() - start < 0.2
        late = [req.constraint.num_late > 0 for req in requests]
        assert mask.all(dim=1).tolist() == late
        assert 10 <= sum(late) < 20
    # Whoever waits longest comes first.
    assert all(req.constraint.num_fills >= 1 for req in requests)


def test_masks_are_unpacked_on_a_device_as_on_the_host():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 5), dtype=np.int64).astype(np.int32)
    wanted = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=131)
    found = unpacked(torch.from_numpy(words), 131)
    assert found.dtype == torch.bool and found.tolist() == wanted.astype(bool).tolist()
