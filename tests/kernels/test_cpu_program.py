"""Kernels as stages of a program: the same as one by one, on any number of threads."""

import struct

import pytest
import torch

from kvarena.engine.cpu.compiler import kernel, num_threads, thread_id
from kvarena.engine.cpu.layers import bias_kernel, gather_kernel, norm_kernel
from kvarena.engine.cpu.panels import WIDTH
from kvarena.engine.cpu.program import Program, Variable
from kvarena.engine.cpu.simd import F32, I64, pointer
from kvarena.engine.fusions.panels import Panels


@kernel("3q")
def turned_around(args):
    """out[i] = x[n - 1 - i] + 1, by threads in turn: right only where all have ended what came before."""
    a = pointer(args, I64)
    x, out = pointer(a[0], I64), pointer(a[1], I64)
    for i in range(thread_id(), a[2], num_threads()):
        out[i] = x[a[2] - 1 - i] + 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_stage_begins_when_all_threads_have_ended_the_one_before(threads):
    x, y = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    there, back = (x.data_ptr(), y.data_ptr(), 1000), (y.data_ptr(), x.data_ptr(), 1000)
    program = Program([(turned_around, there), (turned_around, back)] * 200)
    for _ in range(3):
        program.run(threads, 0, 400)
    assert torch.equal(x, torch.arange(1000) + 1200)


def test_variables_are_set_anew_and_some_stages_may_be_left_out():
    x = torch.randn(7, 20)
    weight, out, other = torch.randn(20), torch.zeros(7, 20), torch.zeros(7, 20)
    arguments = Variable(0), weight.data_ptr(), Variable(1), Variable(2), 20, 1e-5
    program = Program(
        [(norm_kernel(F32), arguments), (bias_kernel(F32), (Variable(1), weight.data_ptr(), Variable(2), 20))]
    )
    assert program.names == ["norm", "add_bias"]
    program.set([x.data_ptr(), out.data_ptr(), 7])
    program.run(1, 0, 1)
    want = torch.nn.functional.rms_norm(x, (20,), weight, 1e-5)
    torch.testing.assert_close(out, want)
    program.set([x.data_ptr(), other.data_ptr(), 3])
    program.run(2, 0, 2)
    assert torch.equal(other[:3], out[:3] + weight)
    assert not other[3:].any()


def test_what_is_no_argument_of_a_kernel_is_refused():
    with pytest.raises(struct.error):
        Program([(turned_around, (0, 0))])
    with pytest.raises(struct.error):
        Program([(turned_around, (0, 0, 1.5))])


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_gathered_from_tables_and_panels(threads):
    table, indices = torch.randn(101, 37), torch.tensor([100, 0, 47, 48, 47])
    held = Panels.of(table, WIDTH)
    for address, width in ((table.data_ptr(), 1), (held.address, WIDTH)):
        out = torch.zeros(6, 37)
        gather_kernel(F32)(threads, address, width, indices.data_ptr(), out.data_ptr(), 5, 37)
        assert torch.equal(out[:5], table[indices])
        assert not out[5].any()
