"""Sums over the ranks of a stage, each in the way that is fastest for its size here.

    nccl        the library's, with a communicator for graphs and one for eager steps
    one_shot    torch's symmetric memory: each rank reads all parts
    two_shot    the same: each rank adds up a share of the sum, and all read the shares
    kernel      ours: one-shot, with residual addition and norm behind it (engine/kernels/all_reduce.py)

Peer reads alone: no NVLink multicast, which some virtual machines lack. On a CPU there is gloo.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.ops import Norm
from kvarena.engine.parallel.groups import Group, Groups

WAYS = ("nccl", "one_shot", "two_shot", "kernel")
# Measured at start-up; a larger sum goes the way of the largest.
SIZES = tuple(2**power for power in range(13, 25))
# Rows beyond which a one-shot kernel reads more than it saves.
MOST_ROWS = 512
_MOST_BYTES = SIZES[-1]
_CALLS, _REPLAYS = 20, 7


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
        table: microseconds by bytes and way, the slowest rank's; empty where one way was asked for.
        chosen: the way by bytes.
        without_peers: why no rank can read another's memory; empty where all can.

    Raises:
        EngineError: the way that is asked for cannot be had.
    """

    ways = WAYS

    def __init__(self, groups: Groups, size: int, dtype: torch.dtype, way: str = "auto") -> None:
        self.way = way
        self._groups, self._size, self._dtype = groups, size, dtype
        self._name: Any = groups.tensor_name
        self._device = torch.device("cuda", torch.cuda.current_device())
        # A communicator is made at its first call, which no graph may hold.
        for one in (groups.tensor, groups.captured):
            one.sum(torch.zeros(1, device=self._device))
        torch.cuda.synchronize()
        self._pages: list[Tensor] = []
        self._buffer: Tensor | None = None
        self._memory: Any = None
        self.without_peers = "" if way == "nccl" else self._share_memory()
        if self.without_peers and way != "auto":
            raise EngineError(f"parallel.all_reduce={way} reads other GPUs' memory: {self.without_peers}; use nccl")
        self._ways: dict[str, Callable[[Tensor], Tensor]] = {
            "nccl": self._nccl, "one_shot": self._one_shot, "two_shot": self._two_shot, "kernel": self._kernel,
        }  # fmt: skip
        self.table: dict[int, dict[str, float]] = {}
        self.chosen: dict[int, str] = {}
        if way == "auto":
            self.measure()
        else:
            self.chosen = dict.fromkeys(SIZES, way)

    def _share_memory(self) -> str:
        """Get memory that all ranks can read; why there is none on some rank, or an empty string."""
        reason = ""
        try:
            import torch.distributed._symmetric_memory as symmetric

            buffer = symmetric.empty(_MOST_BYTES // self._dtype.itemsize, dtype=self._dtype, device=self._device)
            symmetric.rendezvous(buffer, self._name)
            memory = self.peer_memory(MOST_ROWS, self._size, self._dtype)
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
        failed = torch.tensor(float(bool(reason)), device=self._device)
        if self._groups.tensor.sum(failed).item():
            return reason or "another rank cannot share its own"
        self._buffer, self._memory = buffer, memory
        return ""

    def peer_memory(self, num_rows: int, size: int, dtype: torch.dtype) -> Any:
        """Memory for `all_reduce` or `best_token` (`PeerMemory`); all ranks of the stage get theirs together."""
        import torch.distributed._symmetric_memory as symmetric

        # Imported here: a CPU has no use for the kernels.
        from kvarena.engine.kernels.all_reduce import PeerMemory

        group = self._groups.tensor
        data, flags = PeerMemory.num_bytes(group.size, num_rows, size, dtype)
        page = symmetric.empty(data + flags, dtype=torch.uint8, device=self._device)
        handle: Any = symmetric.rendezvous(page, self._name)
        page.zero_()
        torch.cuda.synchronize()
        # Nobody begins before all flags are zero.
        group.sum(torch.zeros(1, device=self._device))
        torch.cuda.synchronize()
        addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self._device)
        calls = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        self._pages.append(page)
        return PeerMemory(addresses, addresses + data, calls, group.rank, num_rows, size, dtype)

    def best_memory(self, num_rows: int) -> Any:
        """Memory for `best_token`, where our kernel is what small sums take; else None."""
        return self.peer_memory(num_rows, 2, torch.float32) if self.chosen[SIZES[0]] == "kernel" else None

    def sum(self, x: Tensor) -> Tensor:
        """See `Reducer.sum`."""
        return self._ways[self.way_of(x)](x)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor | None:
        """See `Reducer.add_norm`."""
        if self.way_of(x) != "kernel" or not self.takes(x, "kernel"):
            return None
        from kvarena.engine.kernels.all_reduce import all_reduce

        return all_reduce(x, self._memory, residual=residual, weight=norm.weight, epsilon=norm.eps)

    def way_of(self, x: Tensor) -> str:
        """The way of a sum of this size."""
        num_bytes = x.numel() * x.element_size()
        way = next((self.chosen[size] for size in SIZES if num_bytes <= size), self.chosen[SIZES[-1]])
        return way if self.takes(x, way) else "nccl"

    def takes(self, x: Tensor, way: str) -> bool:
        """Whether a way has such sums."""
        if way != "nccl" and self._buffer is None:
            return False
        if way == "kernel":
            return x.dim() == 2 and len(x) <= MOST_ROWS and x.shape[1] == self._size and x.dtype == self._dtype
        if way in ("one_shot", "two_shot"):
            num_bytes = x.numel() * x.element_size()
            # Shares are cut in pieces of 16 bytes.
            is_even = num_bytes % (16 * self._groups.tensor.size) == 0
            return is_even and num_bytes <= _MOST_BYTES and x.dtype == self._dtype
        return True

    def _nccl(self, x: Tensor) -> Tensor:
        group = self._groups.captured if torch.cuda.is_current_stream_capturing() else self._groups.tensor
        return group.sum(x)

    def _one_shot(self, x: Tensor) -> Tensor:
        assert self._buffer is not None
        found: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            self._buffer[: x.numel()], x.view(-1), "sum", self._name
        )
        return found.view_as(x)

    def _two_shot(self, x: Tensor) -> Tensor:
        assert self._buffer is not None
        part = self._buffer[: x.numel()]
        part.copy_(x.view(-1))
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._name)
        return x.copy_(part.view_as(x))

    def _kernel(self, x: Tensor) -> Tensor:
        from kvarena.engine.kernels.all_reduce import all_reduce

        return all_reduce(x, self._memory, out=x)

    def measure(self) -> None:
        """Time every way at every size in a CUDA graph, and choose; the same on every rank."""
        for num_bytes in SIZES:
            rows = max(1, num_bytes // (self._size * self._dtype.itemsize))
            x = torch.zeros(rows, self._size, dtype=self._dtype, device=self._device)
            times = {way: self.time(way, x) for way in WAYS if self.takes(x, way)}
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
        run = self._behind(way, x, residual, norm) if norm is not None else lambda: self._ways[way](x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_CALLS):
                run()
        times = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        own = torch.tensor(statistics.median(times) * 1e3 / _CALLS, device=x.device)
        return float(self._groups.tensor.gather(own).max())

    def _behind(self, way: str, x: Tensor, residual: Tensor, norm: Norm) -> Callable[[], object]:
        """A sum with residual addition and norm: in one launch, or by those that one device has."""
        from kvarena.engine.kernels.all_reduce import all_reduce
        from kvarena.engine.kernels.norm import rms_norm

        if way == "kernel":
            return lambda: all_reduce(x, self._memory, residual=residual, weight=norm.weight, epsilon=norm.eps)
        return lambda: rms_norm(self._ways[way](x), norm.weight, norm.eps, residual=residual)


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
