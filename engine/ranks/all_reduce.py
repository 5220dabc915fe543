"""Sums over the ranks of a stage, each in the way that is fastest for its size here.

    nccl        the library's, with a communicator for graphs and one for eager steps
    one_shot    torch's symmetric memory: each rank reads all parts
    two_shot    the same: each rank adds up a share of the sum, and all read the shares
    kernel      ours: one-shot, with residual addition and norm behind it (engine/kernels/all_reduce.py)

Peer reads alone: no NVLink multicast, which some virtual machines lack. On a CPU there is gloo.

A way is taken only where its sums, in a graph and out of it, came out right at start-up; one that fails is left out.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.ops import Norm
from kvarena.engine.kernels.all_reduce import MOST_POLLS, PeerMemory, all_reduce
from kvarena.engine.kernels.norm import rms_norm
from kvarena.engine.parallel.groups import Group, Groups
from kvarena.engine.runner.graphs import GraphCapture

WAYS = ("nccl", "one_shot", "two_shot", "kernel")
# Measured at start-up; a larger sum goes the way of the largest.
SIZES = tuple(2**power for power in range(13, 27))
_MOST_BYTES = SIZES[-1]
# Beyond which a one-shot kernel reads more than it saves.
_ONE_SHOT_BYTES = 2**22
# As many sums as a token of a model of 32 layers needs, for the ranks to leave at different times.
_CALLS, _REPLAYS = 64, 5
_CALLS_OF_MANY_BYTES, _MANY_BYTES = 8, 2**22
# Of the first sums: some ten seconds, in which the other rank may compile.
_TRIAL_POLLS = 1 << 24
_TRIAL_ROWS = (1, 5, 64)


class GroupReducer:
    """The group's own sum, whatever the size."""

    ways = ("gloo",)

    def __init__(self, group: Group) -> None:
        self._group = group

    def time(self, way: str, x: Tensor, *, norm: Norm | None = None) -> float:  # noqa: ARG002
        """Microseconds of a sum of `x` on the slowest rank, by the clock."""
        times = []
        for _ in range(_REPLAYS):
            begin = time.perf_counter()
            self._group.sum(x)
            times.append(time.perf_counter() - begin)
        return float(self._group.gather(torch.tensor(statistics.median(times) * 1e6)).max())

    def sum(self, x: Tensor) -> Tensor:
        """See `Reducer.sum`."""
        return self._group.sum(x)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> None:  # noqa: ARG002
        """See `Reducer.add_norm`: there is no such launch."""
        return


class AllReduce:
    """See the module; all ranks of a stage make it together.

    Args:
        groups: of this rank, on a GPU.
        size: elements of a row.
        dtype: of them.
        way: one for all sizes, or auto: the fastest for each.

    Attributes:
        way: that was asked for.
        table: microseconds of a sum with residual addition and norm behind it, by bytes and way, the slowest rank's;
            empty where one way was asked for.
        chosen: the way by bytes.
        left_out: why a way is not taken, by way.

    Raises:
        EngineError: the way that is asked for cannot be had.
    """

    def __init__(self, groups: Groups, size: int, dtype: torch.dtype, way: str = "auto") -> None:
        self.way = way
        self._groups, self._size, self._dtype = groups, size, dtype
        self._name: Any = groups.tensor_name
        self._most_rows = max(1, _ONE_SHOT_BYTES // (size * dtype.itemsize))
        self._device = torch.device("cuda", torch.cuda.current_device())
        groups.tensor.meet(self._device)
        self._pages: list[Tensor] = []
        self._buffer: Tensor | None = None
        self._memory: Any = None
        self._polls = _TRIAL_POLLS
        self._ways: dict[str, Callable[[Tensor], Tensor]] = {
            "nccl": groups.tensor.sum, "one_shot": self._one_shot, "two_shot": self._two_shot, "kernel": self._kernel,
        }  # fmt: skip
        self.left_out = self._try(WAYS if way == "auto" else (way,))
        self._polls = MOST_POLLS
        if why := self.left_out.get("nccl" if way == "auto" else way):
            raise EngineError(f"GPUs cannot add up by parallel.all_reduce={way}: {why}; use another way")
        self.table: dict[int, dict[str, float]] = {}
        self.chosen: dict[int, str] = {}
        if way == "auto":
            self._measure()
        else:
            self.chosen = dict.fromkeys(SIZES, way)

    @property
    def ways(self) -> tuple[str, ...]:
        """Those that can be had."""
        return tuple(way for way in WAYS if way == "nccl" or (self._buffer is not None and way not in self.left_out))

    def _try(self, ways: tuple[str, ...]) -> dict[str, str]:
        """Make what the ways need, and see that they add up; why not, by way."""
        without_peers = "" if ways == ("nccl",) else self._agreed(self._share_memory)
        found = {}
        for way in ways:
            why = (way != "nccl" and without_peers) or self._agreed(functools.partial(self._trial, way))
            if why:
                found[way] = why
        return found

    def _agreed(self, run: Callable[[], str]) -> str:
        """What `run` says is wrong, by a word or an error; every rank has something to say where one has."""
        try:
            reason = run()
        except (RuntimeError, ImportError, EngineError) as error:
            reason = str(error).splitlines()[0]
        failed = torch.tensor(float(bool(reason)), device=self._device)
        if not self._groups.tensor.sum(failed).item():
            return ""
        return reason or "another rank of the stage cannot"

    def _share_memory(self) -> str:
        """Get memory that all ranks can read."""
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty(_MOST_BYTES // self._dtype.itemsize, dtype=self._dtype, device=self._device)
        symmetric.rendezvous(buffer, self._name)
        self._memory = self.peer_memory(self._most_rows, self._size, self._dtype)
        self._buffer = buffer
        return ""

    def peer_memory(self, num_rows: int, size: int, dtype: torch.dtype) -> PeerMemory:
        """Memory for `all_reduce` or `best_token`; all ranks of the stage get theirs together."""
        import torch.distributed._symmetric_memory as symmetric

        group = self._groups.tensor
        data, flags = PeerMemory.num_bytes(group.size, num_rows, size, dtype)
        page = symmetric.empty(data + flags, dtype=torch.uint8, device=self._device)
        handle: Any = symmetric.rendezvous(page, self._name)
        page.zero_()
        # Nobody begins before all flags are zero.
        group.sum(torch.zeros(1, device=self._device))
        torch.cuda.synchronize()
        bases = list(handle.buffer_ptrs)
        # Torch may have put it into a larger piece of memory, whose beginning it tells.
        within = page.data_ptr() - bases[group.rank]
        addresses = torch.tensor(bases, dtype=torch.int64, device=self._device) + within
        calls = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        self._pages.append(page)
        return PeerMemory(addresses, addresses + data, calls, group.rank, num_rows, size, dtype)

    def best_memory(self, num_rows: int) -> PeerMemory | None:
        """Memory for `best_token`, where our kernel is what small sums take; else None."""
        return self.peer_memory(num_rows, 2, torch.float32) if self.chosen[SIZES[0]] == "kernel" else None

    def _trial(self, way: str) -> str:
        """Add up what every rank can compute by itself: small integers, which no type rounds."""
        rank, size = self._groups.tensor.rank, self._groups.tensor.size
        base, is_right = torch.arange(self._size, device=self._device) % 7, True
        for rows in _TRIAL_ROWS:
            own = (base * (rank + 1) + rank).expand(rows, -1).to(self._dtype).contiguous()
            wanted = (base * size * (size + 1) // 2 + size * (size - 1) // 2).to(self._dtype).expand(rows, -1)
            x, out = torch.empty_like(own), torch.empty_like(own)
            run = self._summing(way, own, x, out)
            if not self.takes(x, way):
                continue
            run()
            graph = GraphCapture()(run, f"an all-reduce by {way}")
            for _ in range(3):  # to the end, whatever comes out: the other ranks do so too
                is_right &= torch.equal(out, wanted)
                out.zero_()
                graph.replay()
        return "" if is_right else "its sums are wrong"

    def _summing(self, way: str, own: Tensor, x: Tensor, out: Tensor) -> Callable[[], None]:
        def run() -> None:
            x.copy_(own)
            for _ in range(2):  # in turn with itself, as layers follow one another
                out.copy_(self._ways[way](x))
                x.copy_(own)

        return run

    def sum(self, x: Tensor) -> Tensor:
        """See `Reducer.sum`."""
        way = self.way_of(x)
        found = self._ways[way](x)
        return x.copy_(found) if way == "two_shot" else found  # whose place the next sum takes

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """See `Reducer.add_norm`."""
        return self._add_norm(self.way_of(x), x, residual, norm)

    def _add_norm(self, way: str, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        if way == "kernel":
            return all_reduce(
                x, self._memory, residual=residual, weight=norm.weight, epsilon=norm.eps, polls=self._polls
            )
        return rms_norm(self._ways[way](x), norm.weight, norm.eps, residual=residual)

    def way_of(self, x: Tensor) -> str:
        """The way of a sum of this size."""
        num_bytes = x.numel() * x.element_size()
        way = next((self.chosen[size] for size in SIZES if num_bytes <= size), self.chosen[SIZES[-1]])
        return way if self.takes(x, way) else "nccl"

    def takes(self, x: Tensor, way: str) -> bool:
        """Whether a way has such sums."""
        if way == "nccl":
            return True
        if self._buffer is None:
            return False
        if way == "kernel":
            return x.dim() == 2 and len(x) <= self._most_rows and x.shape[1] == self._size and x.dtype == self._dtype
        num_bytes = x.numel() * x.element_size()
        # Shares are cut in pieces of 16 bytes.
        is_even = num_bytes % (16 * self._groups.tensor.size) == 0
        return is_even and num_bytes <= _MOST_BYTES and x.dtype == self._dtype

    def _one_shot(self, x: Tensor) -> Tensor:
        assert self._buffer is not None
        part = self._buffer[: x.numel()]
        found: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(part, x.view(-1), "sum", self._name)
        return found.view_as(x)

    def _two_shot(self, x: Tensor) -> Tensor:
        """In the buffer, until the next sum."""
        assert self._buffer is not None
        part = self._buffer[: x.numel()]
        part.copy_(x.view(-1))
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._name)
        return part.view_as(x)

    def _kernel(self, x: Tensor) -> Tensor:
        return all_reduce(x, self._memory, out=x, polls=self._polls)

    def _measure(self) -> None:
        """Time every way at every size in a CUDA graph, and choose; the same on every rank."""
        norm = Norm(torch.ones(self._size, dtype=self._dtype, device=self._device), 1e-5)
        for num_bytes in SIZES:
            rows = max(1, num_bytes // (self._size * self._dtype.itemsize))
            x = torch.zeros(rows, self._size, dtype=self._dtype, device=self._device)
            times = {way: self.time(way, x, norm=norm) for way in self.ways if self.takes(x, way)}
            self.table[num_bytes] = times
            self.chosen[num_bytes] = min(times, key=lambda way: times[way])

    def time(self, way: str, x: Tensor, *, norm: Norm | None = None) -> float:
        """Microseconds of a sum of `x` in a CUDA graph, on the slowest rank; with `norm`, all that stands behind it.

        Raises:
            EngineError: the way takes no such sum.
        """
        if not self.takes(x, way):
            raise EngineError(f"all-reduce by {way} takes no {list(x.shape)} of {x.dtype}")
        residual = torch.zeros_like(x)
        calls = _CALLS if x.numel() * x.element_size() < _MANY_BYTES else _CALLS_OF_MANY_BYTES

        def run() -> None:
            for _ in range(calls):
                if norm is None:
                    self._ways[way](x)
                else:
                    self._add_norm(way, x, residual, norm)

        run()
        graph = GraphCapture()(run, f"all-reduces by {way}")
        times = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        own = torch.tensor([statistics.median(times) * 1e3 / calls], device=x.device)
        return float(self._groups.tensor.gather(own).max())


def make_reducer(groups: Groups, size: int, dtype: torch.dtype, way: str) -> GroupReducer | AllReduce | None:
    """What adds up the parts of a stage's ranks; None where there is but one.

    Args:
        groups: of this rank.
        size: elements of a row.
        dtype: of them.
        way: see `AllReduce`; on a CPU there is one.
    """
    if groups.tensor.size == 1:
        return None
    if groups.device.type != "cuda":
        return GroupReducer(groups.tensor)
    found = groups.reducer
    if found is None or found.way != way:  # one model has one; measuring takes a second
        found = groups.reducer = AllReduce(groups, size, dtype, way)
    return found
