"""What the benchmark of shared reads says of a kernel's results: in the interpreter, and of launches that go wrong."""

import pytest
import torch

from kvarena.engine.kernels.attention.config import SharedConfig
from kvarena.experiments.benchmarks.kernels import attention_cases, shared_reads
from kvarena.experiments.benchmarks.kernels.attention_cases import AttentionShape, relative_error, unequal_rows
from kvarena.experiments.benchmarks.kernels.shared_reads import Case, repeated, shared_batch, shared_line

ROWS, HEADS, SIZE = 5, 2, 8


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """A graph is captured on a GPU alone; what it leaves in the output is what its launches leave."""

    def run(launches):
        for launch in launches:
            launch()
        return 1.0

    monkeypatch.setattr(shared_reads, "time_launches", run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_a_kernel_that_repeats_itself_is_said_to_whatever_the_other_layers_hold(monkeypatch):
    """They share the output, and timing them leaves the last one's in it."""
    monkeypatch.setattr(attention_cases, "ROTATED_BYTES", 0)
    monkeypatch.setattr(shared_reads, "ROTATED_BYTES", 0)
    monkeypatch.setattr(shared_reads, "REPEATS", 1)
    batch, tables = shared_batch(Case(1, 256, 3, 20), AttentionShape("small", 2, 1, 16), "cpu")
    assert len(batch.keys) == 2
    (call, _), other = shared_reads.attention_calls(batch, contiguous=False)
    for row, table in enumerate(tables):
        other[row] = _dense(call, table, int(batch.seq_lens[row]), row)
    assert relative_error(batch, 0, other, call.scale) < 0.01
    other[1] *= 1.5
    config = SharedConfig(64, 64, 16, 16, num_warps=4, num_stages=2, programs_per_sm=1)
    line = shared_line(batch, tables, config, 1e12, other, num_multiprocessors=2)
    assert line["same_bits"] and line["bits"] == {"rows": 0, "nans": 0, "largest": 0.0, "first": []}
    assert line["error"] < 0.01 and line["saved_tokens"] == 2 * 256
    # Beside another kernel's rows, of which one is not this one's.
    assert line["far"]["rows"] == 1 and line["far"]["first"] == [1]


def _dense(call, table, seq_len, row):
    at = torch.arange(seq_len)
    slots = torch.tensor(table)[at // call.block_size] * call.block_size + at % call.block_size
    k, v = (part[slots].double().repeat_interleave(call.group, 1) for part in (call.keys, call.values))
    scores = torch.einsum("hd,khd->hk", call.q[row].double(), k) * call.scale
    return torch.einsum("hk,khd->hd", scores.softmax(1), v)


def launches_of(wrong):
    """Two layers into one output; `wrong` changes what the first one's launch writes, by its number."""
    out, seen = torch.full((ROWS, HEADS, SIZE), torch.nan), []
    layers = [torch.full((ROWS, HEADS, SIZE), float(layer + 1)) for layer in range(2)]

    def first():
        out.copy_(layers[0])
        wrong(out, len(seen))
        seen.append(None)

    return [first, lambda: out.copy_(layers[1])], out


@pytest.mark.parametrize("launch", [1, 5, shared_reads.REPEATS + 1])
def test_one_launch_with_other_bits_is_found(launch):
    """The last one is the graph's."""

    def wrong(out, number):
        out[3, 1, 0] += 0.5 * (number == launch)

    _, found = repeated(*launches_of(wrong))
    assert not found["same_bits"]
    assert found["bits"] == {"rows": 1, "nans": 0, "largest": 0.125, "first": [3]}


def test_a_row_that_nobody_writes_is_found():
    def wrong(out, number):
        out[2] = torch.nan

    first, found = repeated(*launches_of(wrong))
    assert first[2].isnan().all()
    assert found["bits"] == {"rows": 1, "nans": 1, "largest": 0.0, "first": [2]}


def test_rows_within_a_bound_are_equal():
    wanted = torch.ones(3, 1, 100)
    other = wanted * torch.tensor([1.0, 1.01, 1.1])[:, None, None]
    assert unequal_rows([other], wanted, 0.02) == {"rows": 1, "nans": 0, "largest": 0.1, "first": [2]}
    assert unequal_rows([other], wanted)["first"] == [1, 2]
    assert unequal_rows([other * torch.nan], wanted, 0.02)["largest"] is None
