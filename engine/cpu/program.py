"""Kernels one after another in one call: threads are started once, and wait for one another between stages.

    stages      stage 0           stage 1            ...
                kernel, words     kernel, words             a kernel's address, and that of its arguments in
    words       x y rows n ...  | q out keys ...   |        what is fixed, and variables, set anew in each run

                thread 0   norm . product ....  attend ..........  product ..
                thread 1   norm . product ..... attend ........... product .      `.`: waits for the slower one

A kernel does what it does when called by itself, its thread's share of the same work: the same bits come out. Threads
wait in a loop, which takes less than a microsecond where each has a core, and let others have the core when it takes
longer.
"""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvarena.engine.cpu.compiler import Kernel, give_way, kernel, num_threads
from kvarena.engine.cpu.simd import I64, intrinsic, pointer

_INT64 = ir.IntType(64)
_PATIENCE = 4096  # rounds of a loop, some 10 us, after which a thread lets others have its core


@dataclass(frozen=True)
class Variable:
    """A word that each run sets: the number `index` of the run's `values`."""

    index: int


class Program:
    """Stages that run in order. Calls from several threads at once are not for one program.

    Args:
        stages: a kernel and its arguments each; variables in place of integers and addresses.

    Attributes:
        names: of the stages' kernels.
    """

    def __init__(self, stages: list[tuple[Kernel, tuple[Any, ...]]]) -> None:
        self.names = [stage.name for stage, _ in stages]
        parts = [stage.pack(*(0 if isinstance(one, Variable) else one for one in given)) for stage, given in stages]
        self._words = np.frombuffer(b"".join(parts), dtype=np.int64).copy()
        every = [argument for _, given in stages for argument in given]
        # Where variables are, and which.
        self._at = np.array([at for at, one in enumerate(every) if isinstance(one, Variable)], dtype=np.int64)
        self._which = np.array([one.index for one in every if isinstance(one, Variable)], dtype=np.int64)
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        addresses = np.array([stage.address for stage, _ in stages])
        self._stages = np.stack([addresses, self._words.ctypes.data + starts], axis=1)
        self._first = self._stages.ctypes.data
        self._arrivals = np.zeros(1, dtype=np.int64)
        self._place = self._arrivals.ctypes.data
        self._run = stages_kernel()

    def set(self, values: list[int]) -> None:
        """Give the variables their values, by index, for the runs to come. What they point to must outlive these."""
        self._words[self._at] = np.array(values, dtype=np.int64)[self._which]

    def run(self, threads: int, first: int, last: int) -> None:
        """Run the stages from `first` to before `last` on so many threads."""
        self._arrivals[0] = 0
        self._run(threads, self._first + 16 * first, last - first, self._place)


@cache
def stages_kernel() -> Kernel:
    """Runs stages, threads waiting for one another before each but the first.

    Arguments of a call, after the number of threads: stages (int64 [count, 2]: a kernel's address and that of its
    arguments), count, arrivals (int64 [1], zero).
    """

    @kernel("3q")
    def run_stages(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        stages, arrivals, team = pointer(a[0], I64), pointer(a[2], I64), np.int64(num_threads())
        for stage in range(a[1]):
            if team > 1 and stage > 0:
                arrive(arrivals)
                turns = np.int64(0)
                while arrived(arrivals) < team * stage:
                    turns += 1
                    if turns > _PATIENCE:
                        give_way()
            call_kernel(stages[2 * stage], stages[2 * stage + 1])

    return run_stages


@intrinsic
def call_kernel(typing: Any, address: Any, args: Any) -> Any:
    """Call the kernel at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def arrive(typing: Any, count: Any) -> Any:
    """Add one to what all threads see. What was written before is there for those who see it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", args[0], ir.Constant(_INT64, 1), ordering="acq_rel")
        return context.get_dummy_value()

    return types.void(count), generate


@intrinsic
def arrived(typing: Any, count: Any) -> Any:
    """What `arrive` has made of it so far."""
    return types.int64(count), lambda _context, builder, _signature, args: builder.load_atomic(args[0], "acquire", 8)
