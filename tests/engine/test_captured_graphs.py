"""Captured graphs without a GPU: what a capture records is launched again by every replay, in its place."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool, run
from runner_driver import make_requests

from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.graphs import CapturedGraph, GraphShape
from kvarena.engine.runner.torch_runner import TorchRunner

PROMPTS = random_prompts((5, 13, 1, 30, 17, 8))


class Recorder:
    """Stands for `GraphCapture`: a capture only notes what is launched, as on a GPU, and a replay launches that."""

    def __init__(self):
        self.captured, self.num_replays = [], 0

    def __call__(self, launch, what):
        self.captured.append(what)

        def replay():
            self.num_replays += 1
            launch()

        return SimpleNamespace(replay=replay)


@pytest.mark.parametrize("num_plain", [1, 2])
def test_a_shape_runs_as_it_is_before_it_is_captured_once(num_plain):
    launches, capture = [], Recorder()
    graph = CapturedGraph(GraphShape(4, 4, is_decode=True), None, lambda: launches.append(1), num_plain, capture)
    for run_index in range(5):
        graph.run()
        assert len(launches) == run_index + 1
        assert len(capture.captured) == (run_index + 1 >= num_plain)
    assert capture.num_replays == 5 - num_plain
    assert capture.captured == ["the decode forward for 4 requests"]


def test_a_shape_that_is_in_a_hurry_is_captured_at_its_next_run():
    launches, capture = [], Recorder()
    graph = CapturedGraph(GraphShape(16, 8, is_decode=False), None, lambda: launches.append(1), 2, capture)
    assert not graph.is_ready
    graph.hurry()
    graph.run()
    assert graph.is_ready and len(capture.captured) == 1
    graph.hurry()
    graph.run()
    assert len(capture.captured) == 1 and capture.num_replays == 1


def test_without_a_capture_every_step_is_launched():
    launches = []
    graph = CapturedGraph(GraphShape(16, 8, is_decode=False), None, lambda: launches.append(1), 2, None)
    for _ in range(4):
        graph.run()
    assert len(launches) == 4
    assert graph.is_ready
    assert str(GraphShape(16, 8, is_decode=False)) == "the forward for 16 new tokens of 8 requests"


@pytest.mark.parametrize("warm", [False, True])
def test_replays_give_the_tokens_of_the_plain_runner(tmp_path_factory, warm):
    """Decode and mixed steps, with preemption and overlap: what a graph holds is right for whoever comes next."""
    model = load_model(write_checkpoint(tmp_path_factory.mktemp("llama"), "llama"))
    options = {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5}
    requests = make_requests(PROMPTS, 14, **options)
    expected = run(TorchRunner(model, make_pool(model, 18, 4)), requests, overlap=False)
    assert sum(req.num_preemptions for req in requests) > 0
    pool = make_pool(model, 18, 4)
    runner = FusedRunner(
        model, pool, LateReference(pool), fuse(model, TorchOps(), 128), max_num_seqs=4, max_model_len=128,
        mixed_tokens=16,
    )  # fmt: skip
    capture = runner._graphs._capture = Recorder()
    runner._graphs._graphs.clear()
    if warm:
        assert runner.warm_up(4, 16) == len(capture.captured) == 3 + 1
        assert runner.warm_up(4, 16) == 0 and capture.num_replays == 0
    assert run(runner, make_requests(PROMPTS, 14, **options), overlap=True) == expected
    assert len(set(capture.captured)) == len(capture.captured)
    assert capture.num_replays > 10
    assert torch.isfinite(runner._graphs._logits).all()
