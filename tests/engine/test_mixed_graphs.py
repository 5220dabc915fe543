"""Small steps with prompts in them, at fixed addresses."""

import functools

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from fused_helpers import LateReference, make_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.engine.contract import ScheduledRequest, StepPlan
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.graphs import GraphShape
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.step_graphs import (
    MixedStep,
    StepGraphs,
    _smallest,
    decode_buckets,
    graph_tokens,
    row_buckets,
    token_buckets,
)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    model = load_model(write_checkpoint(tmp_path_factory.mktemp("llama"), "llama"))
    pool = make_pool(model, 16, 4)
    backend = LateReference(pool)
    forward = functools.partial(fuse(model, TorchOps(), 128), backend=backend, pool=pool)
    rows = RequestRows(model.spec.vocab_size, "cpu", num_rows=6, width=8)
    rows.last_tokens[:] = torch.arange(7)
    logits = torch.zeros(4, model.spec.vocab_size)
    return StepGraphs(forward, backend, rows, logits, 4, 32, capture=None), rows.tables


def step_of(*entries):
    """A step of (row, start, tokens, sampled)."""
    rows, starts, tokens, samples = zip(*entries, strict=True)
    return MixedStep(
        tokens=np.array([token for part in tokens for token in part], dtype=np.int32),
        starts=np.array(starts),
        counts=np.array([len(part) for part in tokens]),
        rows=np.array(rows),
        samples=np.array(samples),
    )


def test_a_step_gives_the_logits_of_its_requests_alone(graphs):
    """Padded or not, in company or alone, and with a token that only the device has."""
    graphs, tables = graphs
    mixed = graphs.mixed
    tables.update(2, [3, 4])
    tables.update(5, [7, 8, 9])
    both = mixed(step_of((2, 0, [11, 12, 13, 14, 15], True), (5, 0, [21, 22, 23], True))).clone()
    alone = mixed(step_of((5, 0, [21, 22, 23], True))).clone()
    assert both.shape[0] == 2
    torch.testing.assert_close(both[1], alone[0], rtol=1e-5, atol=1e-5)
    on_device = mixed(step_of((2, 5, [-1], True), (5, 3, [24, 25], False))).clone()
    known = mixed(step_of((2, 5, [2], True))).clone()  # row 2's last token
    assert on_device.shape[0] == 1
    torch.testing.assert_close(on_device[0], known[0], rtol=1e-5, atol=1e-5)
    # Chunks give what the whole prompt gives.
    whole = mixed(step_of((5, 0, [21, 22, 23, 24, 25], True)))
    chunk = mixed(step_of((5, 3, [24, 25], True)))
    torch.testing.assert_close(whole, chunk, rtol=1e-5, atol=1e-5)


@pytest.fixture
def dirty_memory():
    """Memory that torch hands out without clearing it holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def test_padding_leaves_nothing_of_dirty_memory(graphs, dirty_memory):
    """By the null block it would reach the keys that every other request masks."""
    assert torch.empty_like(torch.ones(1)).isnan()
    graphs, tables = graphs
    tables.update(3, [5, 6])
    for start in (0, 3):
        assert graphs.mixed(step_of((3, start, [11, 12, 13], True))).isfinite().all()
    assert all(part.isfinite().all() for part in graphs._backend.pool.slots(1))


def test_steps_that_ask_for_more_go_elsewhere(graphs):
    graphs, _ = graphs

    def plan(num_tokens, **sampling):
        req = Request("r", [1] * 40, SamplingParams(**sampling))
        return StepPlan(scheduled=[ScheduledRequest(req, 0, num_tokens)], samples=[False])

    assert graphs.takes(plan(32))
    assert not graphs.takes(plan(33))
    assert not graphs.takes(plan(8, prompt_logprobs=1))


@pytest.mark.parametrize("most", [16, 100, 372, 2048])
def test_buckets_hold_every_step_and_pad_little(most):
    buckets = token_buckets(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    for count in range(64, most + 1):
        bucket = next(size for size in buckets if size >= count)
        assert bucket <= max(128, count * 1.25)
    assert row_buckets(100) == [8, 100]
    assert row_buckets(4) == [4]
    assert token_buckets(0) == []


@given(
    most_rows=st.integers(1, 300), most_tokens=st.integers(1, 2048), mixed=st.integers(0, 2048), steps=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_shapes_of_a_warm_up_are_those_of_the_steps_that_can_come(most_rows, most_tokens, mixed, steps):
    """Every step's shape is among them, and each is the shape of some step."""
    graphs = object.__new__(StepGraphs)
    graphs._reads = None
    graphs._decode_buckets, graphs._row_buckets = decode_buckets(300), row_buckets(300)
    graphs._token_buckets = token_buckets(mixed)
    shapes = graphs.reachable(most_rows, most_tokens)
    assert len(set(shapes)) == len(shapes)
    rows = steps.draw(st.integers(1, min(most_rows, most_tokens)))
    assert GraphShape(*[_smallest(graphs._decode_buckets, rows)] * 2, is_decode=True) in shapes
    if min(mixed, most_tokens) >= rows:
        tokens = steps.draw(st.integers(rows, min(mixed, most_tokens)))
        sizes = _smallest(graphs._token_buckets, tokens), _smallest(graphs._row_buckets, rows)
        assert GraphShape(*sizes, is_decode=False) in shapes
    for shape in shapes:
        fewest_rows = max([0, *(size for size in (decode_buckets(300) if shape.is_decode else row_buckets(300))
                                if size < shape.num_rows)]) + 1  # fmt: skip
        fewest_tokens = max([0, *(size for size in graphs._token_buckets if size < shape.num_tokens)]) + 1
        least = fewest_rows if shape.is_decode else max(fewest_rows, fewest_tokens)
        assert fewest_rows <= most_rows and least <= most_tokens, shape
        assert shape.is_decode or fewest_rows <= shape.num_tokens


def test_a_cell_captures_few_shapes():
    """Some tens of milliseconds each, before every cell; few where a cell is small."""
    graphs = object.__new__(StepGraphs)
    graphs._reads = None
    graphs._decode_buckets, graphs._row_buckets = decode_buckets(256), row_buckets(256)
    for parameters, most in ((600_000_000, 97), (8_000_000_000, 73)):
        graphs._token_buckets = token_buckets(graph_tokens(parameters))
        assert len(graphs.reachable(256, 8192)) <= most
    assert len(graphs.reachable(8, 512)) <= 20


def test_large_models_have_few_host_bound_steps():
    assert graph_tokens(600_000_000) == 2048
    assert 700 < graph_tokens(8_000_000_000) < 800
