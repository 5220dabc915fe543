"""The groups in which ranks talk: torch.distributed's process groups, made for one engine and owned by it.

tensor     the ranks of a stage: sums of partial results, logits, tokens
onward     a stage's rows to the next stage
back       the last stage's tokens to the first
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from kvarena.engine.errors import EngineError
from kvarena.engine.parallel.layout import Layout

_MOST_SENT = 64
_LOOK_SECONDS = 0.02
# Ranks compile at different speeds, and NCCL counts from the launch and ends the process. Hearts are watched apart.
_NCCL_TIMEOUT = timedelta(minutes=10)
# No multicast, which some virtual machines lack; graphs and eager calls have communicators of their own.
_NCCL_SETTINGS = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_MIXING_SUPPORT": "0",
}  # fmt: skip


def _ended(work: Any) -> None:
    """Wait for a call of a group; NCCL's on the current stream (asyncOp off) have nothing to wait for: None."""
    if work is not None:
        work.wait()


class Group:
    """Some ranks that compute the same thing together; every one calls the same methods in the same order.

    Args:
        group: torch's process group.
        rank: this rank within it.
        size: how many there are.
        captured: on GPUs, the same ranks' group for what a CUDA graph captures: NCCL keeps graphs and eager calls of
            one communicator apart only at a price (NCCL_GRAPH_MIXING_SUPPORT).
    """

    def __init__(self, group: Any, rank: int, size: int, captured: Any = None) -> None:
        self._group, self._captured = group, captured
        self.rank, self.size = rank, size
        self._options = c10d.AllreduceOptions(), c10d.AllgatherOptions(), c10d.BroadcastOptions()
        self._options[2].rootRank = 0
        for options in self._options:
            # On the current stream, between the kernels that a call is for; left to itself torch takes one of its own.
            options.asyncOp = captured is None

    def meet(self, device: torch.device) -> None:
        """Make the communicators, which NCCL does at the first call, and no graph may hold that."""
        for group in (self._group, self._captured):
            _ended(group.allreduce([torch.zeros(1, device=device)], self._options[0]))
        torch.cuda.synchronize(device)

    def sum(self, x: Tensor) -> Tensor:
        """`x`, contiguous, overwritten with the sum over the ranks."""
        _ended(self._now.allreduce([x], self._options[0]))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's `x`, by rank."""
        out, x = x.new_empty(self.size, *x.shape), x.contiguous()
        if self._captured is None:
            _ended(self._group.allgather([list(out.unbind())], [x], self._options[1]))
        else:  # straight into `out`; NCCL would copy from a list of its parts
            _ended(self._now._allgather_base(out.view(-1), x.view(-1), self._options[1]))
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        """`x`, overwritten with that of the group's first rank."""
        _ended(self._now.broadcast([x], self._options[2]))
        return x

    @property
    def _now(self) -> Any:
        is_captured = self._captured is not None and torch.cuda.is_current_stream_capturing()
        return self._captured if is_captured else self._group


class Link:
    """Tensors from one rank of the world to another; shapes are known on both sides.

    Args:
        group: torch's process group of all ranks, for this direction alone.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        # Kept until they have surely arrived; a receiver is never so far behind.
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._counts: Counter[tuple[str, int]] = Counter()

    def send(self, x: Tensor, rank: int) -> None:
        """Start sending; `x` must not change before it has arrived."""
        x = x.contiguous()
        self._sent.append((self._group.send([x], rank, self._tag("to", rank)), x))
        if len(self._sent) > _MOST_SENT:
            self._sent.popleft()[0].wait()

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """Wait for what `rank` sent, in the order in which it was sent; into `x`."""
        self._group.recv([x], rank, self._tag("from", rank)).wait()
        return x

    def _tag(self, way: str, rank: int) -> int:
        self._counts[way, rank] += 1
        return self._counts[way, rank] % (1 << 20)


def arrive(store: dist.Store, layout: Layout, check: Callable[[], None]) -> None:
    """Wait until all ranks are here: how long their imports take is no matter of a collective's time limit.

    Args:
        store: where they meet.
        layout: of this rank.
        check: called now and then; raises where they will not come.
    """
    if store.add("arrived", 1) == layout.world_size:
        store.set("all", "here")
    while not store.check(["all"]):
        check()
        time.sleep(_LOOK_SECONDS)


class Groups:
    """All groups of one rank.

    Args:
        layout: where this rank stands.
        store: where the ranks of one engine meet; nobody else's.
        device: of this rank.
        host: the address on which this rank is reached.
        timeout: seconds after which a collective has failed, on a CPU.

    Attributes:
        tensor: this rank's stage.
        tensor_name: torch's name of it, on a GPU.
        onward, back: between the stages; None without.
        reducer: of sums in graphs, for whoever else reads other GPUs' memory; None: nobody made one.
    """

    def __init__(self, layout: Layout, store: dist.Store, device: torch.device, host: str, timeout: float) -> None:
        self.layout, self.device = layout, device
        self._store, self._host = store, host
        self._timeout = timedelta(seconds=timeout)
        self.tensor_name = ""
        size, is_staged = layout.tensor, layout.pipeline > 1
        if device.type == "cuda":
            self._begin_nccl()
            eager, captured = self._stage_group(), self._stage_group()
            self.tensor_name = str(eager.group_name)
            onward, back = (dist.new_group(timeout=_NCCL_TIMEOUT) if is_staged else None for _ in range(2))
        else:
            ranks = [layout.stage * size + i for i in range(size)]
            eager, captured = self._gloo(f"stage-{layout.stage}", ranks), None
            everyone = list(range(layout.world_size))
            onward, back = (self._gloo(name, everyone) if is_staged else None for name in ("onward", "back"))
        self.tensor = Group(eager, layout.tensor_rank, size, captured)
        self.onward, self.back = (None if one is None else Link(one) for one in (onward, back))
        self.reducer: Any = None

    def _gloo(self, name: str, ranks: list[int]) -> Any:
        """A group of its own, known to nobody else: a process may have several engines."""
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()
        options._devices = [kind.create_device(hostname=self._host)]
        options._timeout = self._timeout
        store = dist.PrefixStore(name, self._store)
        return kind(store, ranks.index(self.layout.rank), len(ranks), options)

    def _begin_nccl(self) -> None:
        """torch's own world of groups, which symmetric memory needs: one engine of several ranks in a process.

        Raises:
            EngineError: there is one already.
        """
        if dist.is_initialized():
            raise EngineError(
                "this process has an engine of several ranks already; end it first, or use a process of its own"
            )
        for name, value in _NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
        layout = self.layout
        dist.init_process_group(
            "nccl", store=self._store, rank=layout.rank, world_size=layout.world_size, timeout=_NCCL_TIMEOUT
        )

    def _stage_group(self) -> Any:
        """The group of this rank's stage; every rank makes those of all stages."""
        size = self.layout.tensor
        groups = [
            dist.new_group([stage * size + i for i in range(size)], timeout=_NCCL_TIMEOUT)
            for stage in range(self.layout.pipeline)
        ]
        return groups[self.layout.stage]

    def close(self) -> None:
        """The ranks part."""
        if self.device.type == "cuda" and dist.is_initialized():
            # Not `destroy_process_group`, which waits for ranks that have gone.
            dist.distributed_c10d._abort_process_group()
