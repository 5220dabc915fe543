"""The CPU's forward in one call gives the bits of its decoder's kernels, called one by one."""

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import make_pool, run
from runner_driver import make_requests

from kvarena.engine.attention.cpu_backend import CpuBackend
from kvarena.engine.cpu.panels import WIDTH
from kvarena.engine.fusions.cpu_ops import CpuOps
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.panels import in_panels
from kvarena.engine.models import load_model
from kvarena.engine.runner import cpu_forward
from kvarena.engine.runner.cpu_forward import CpuForward
from kvarena.engine.runner.cpu_runner import CpuRunner

# Some behind prompts of several steps, which want no logits; some read several chunks of a context.
PROMPTS = random_prompts((5, 40, 1, 30, 700, 8))
# Head norms; biases, with a window in some layers; a window.
CASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen2": {},
    "mistral": {},
}


def make_runner(directory, case):
    family = "llama" if case == "tied" else case
    model = load_model(write_checkpoint(directory, family, max_position_embeddings=1024, **CASES[case]))
    decoder = in_panels(fuse(model, CpuOps(torch.float32, torch.float32), 1024), model, WIDTH)
    pool = make_pool(model, 300, 4)
    return CpuRunner(model, pool, CpuBackend(pool), decoder)


class Compared:
    """A forward that computes every step twice."""

    def __init__(self, forward):
        self.forward, self.num_steps, self.num_empty = forward, 0, 0

    def __call__(self, input_ids, positions, meta, **options):
        forward = self.forward
        before = forward._pool.data.clone()
        want = forward.decoder(input_ids, positions, meta, forward._backend, forward._pool)
        kv = forward._pool.data.clone()
        forward._pool.data.copy_(before)
        got = forward(input_ids, positions, meta, **options)
        assert torch.equal(got, want)
        assert torch.equal(forward._pool.data, kv)
        self.num_steps += 1
        self.num_empty += not len(got)
        return got


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_kernels_one_by_one(case, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_forward, "most_threads", lambda: threads)
    monkeypatch.setattr(cpu_forward, "_OWN_CORES", 0.0)
    runner = make_runner(tmp_path, case)
    assert isinstance(runner.forward, CpuForward)
    runner.forward = compared = Compared(runner.forward)
    run(runner, make_requests(PROMPTS, 9), overlap=False, max_model_len=1024)
    # Log-probabilities of a prompt want more rows of logits than one a request.
    run(runner, make_requests(PROMPTS[:2], 2, prompt_logprobs=2), overlap=False, max_model_len=1024)
    assert compared.num_steps > 50
    assert compared.num_empty > 20


def test_threads_without_cores_are_left_out_for_longer_and_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_forward, "most_threads", lambda: 2)
    monkeypatch.setattr(cpu_forward, "_OWN_CORES", 2.0)  # more than any threads use
    runner, seen = make_runner(tmp_path, "llama"), []
    program = runner.forward.program
    program_run = program.run
    monkeypatch.setattr(program, "run", lambda threads, *stages: (seen.append(threads), program_run(1, *stages)))
    run(runner, make_requests(PROMPTS[:1], 12), overlap=False)
    assert seen == [2, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    monkeypatch.setattr(cpu_forward, "_OWN_CORES", 0.0)
    run(runner, make_requests(PROMPTS[:1], 5), overlap=False)
    assert seen[12:] == [1, 1, 2, 2, 2]
