"""The KV pool: one tensor for the keys and values of every layer, and the copies that allocators order.

    data [2 (K, V), num_layers, (num_blocks + 1) * block_size, num_kv_heads, head_dim]

            block 0 (null)   block 1            block 2                  block num_blocks
          |----------------|------------------|----------------- ... --|------------------|
    slot   0 .. bs-1         bs .. 2*bs-1       2*bs ..

Two views of it: by slots (stores) and by blocks (loads through a block table). Block 0 belongs to nobody: padding
reads and writes go there. `host` holds swapped blocks, in host memory.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kvarena.engine.checks import check_int
from kvarena.engine.contract import BlockCopy, CopyKind, KVAllocator, StepPlan
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.pool.host_blocks import HostBlocks
from kvarena.engine.pool.memory_limits import asked_and_free, free_bytes, size_text

GIB = 2**30
# A name of it came with Python 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


class KVShape(Protocol):
    """What a model's keys and values look like: its spec, or what a probe of it showed."""

    @property
    def num_layers(self) -> int:
        """Attention layers."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of every layer."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""


class KVPool:
    """Device memory for `num_blocks` usable blocks (ids 1..num_blocks) and, by choice, host memory for swapped ones.

    Args:
        num_blocks: usable blocks; the null block comes on top.
        block_size: slots per block.
        num_layers: attention layers, each with the same heads.
        num_kv_heads: KV heads of a layer.
        head_dim: elements of one head.
        dtype: element type of keys and values.
        device: where the pool lives.
        num_swap_blocks: blocks of host memory, with ids 0..num_swap_blocks; pinned when the pool is on a GPU.
        sized_by: the setting that says how large the pool is, for the error.
        num_backed_blocks: so many blocks are ever in use at once; None: all. On a CPU the others take no memory: the
            system gives it to what is touched.

    Raises:
        ConfigError: a size below 1.
        EngineError: the memory cannot be had; the message says which setting to lower.
    """

    @classmethod
    def of_model(
        cls, shape: KVShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: str | torch.device
    ) -> KVPool:
        """A pool for the layers and heads of `shape`; see the class."""
        return cls(
            num_blocks=num_blocks,
            block_size=block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=device,
        )

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        num_swap_blocks: int = 0,
        sized_by: str = "kv_cache.num_blocks, num_slots or memory_gib",
        num_backed_blocks: int | None = None,
    ) -> None:
        check_int("kv_cache.num_blocks", num_blocks, 1)
        check_int("allocator.block_size", block_size, 1)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_swap_blocks = num_swap_blocks
        self.sized_by = sized_by
        self.num_backed_blocks = num_blocks if num_backed_blocks is None else num_backed_blocks
        self.data = self._make_data((2, num_layers, (num_blocks + 1) * block_size, num_kv_heads, head_dim))
        self._blocks = self.data.view(2, num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim)
        self.host = HostBlocks(self._rows, num_swap_blocks) if num_swap_blocks > 0 else None
        self._slot_views = [(self.data[0, layer], self.data[1, layer]) for layer in range(num_layers)]
        self._block_views = [(self._blocks[0, layer], self._blocks[1, layer]) for layer in range(num_layers)]

    def _make_data(self, shape: tuple[int, ...]) -> Tensor:
        """The pool's tensor. Zeroed, because masked positions are still multiplied: 0 * NaN would not be 0."""
        if self.device.type == "cpu":
            num_bytes = math.prod(shape) * self.dtype.itemsize
            backed = num_bytes * (self.num_backed_blocks + 1) // (self.num_blocks + 1)
            # The system would promise it, and kill the process that takes it.
            if backed > free_bytes(self.device):
                raise _no_room(MemoryError(), self.device, backed, self.sized_by)
            if backed < num_bytes:
                return _reserve(num_bytes, self.sized_by).view(self.dtype).view(shape)
        return _allocate(shape, self.dtype, self.device, self.sized_by)

    @cached_property
    def _rows(self) -> Tensor:
        """One row per block: what a copy moves, for both K and V of every layer at once."""
        return self._blocks.view(2 * self.num_layers, self.num_blocks + 1, -1)

    @property
    def num_slots(self) -> int:
        """Usable slots, the null block left out."""
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory, the null block among them."""
        return self.data.numel() * self.data.element_size()

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by slot: two views [num_slots + block_size, num_kv_heads, head_dim]."""
        return self._slot_views[layer]

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by block: two views [num_blocks + 1, block_size, num_kv_heads, head_dim]."""
        return self._block_views[layer]

    def fill_randomly(self) -> None:
        """Random keys and values everywhere, for whoever measures: zeros take less of a device."""
        for layer in range(self.num_layers):
            self.data[:, layer].normal_()

    def begin_step(self, plan: StepPlan, allocator: KVAllocator) -> None:
        """Called before the copies and the forward of a step. Here all memory is there from the start."""

    def release(self, request_ids: Iterable[str]) -> None:
        """Called when requests have ended: nothing that is launched from now on uses their slots."""

    def apply_copies(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks, with the outcome of doing it one by one in list order.

        Raises:
            EngineError: a block id outside the pool or the host pool.
        """
        for kind, sources, destinations in independent_runs(copies):
            pool_ids = {CopyKind.SWAP_OUT: sources, CopyKind.SWAP_IN: destinations}.get(kind, sources + destinations)
            _check_ids(pool_ids, self.num_blocks + 1, kind)
            if kind is CopyKind.DEVICE:
                rows = self._rows.index_select(1, torch.tensor(sources, device=self.device))
                self._rows.index_copy_(1, torch.tensor(destinations, device=self.device), rows)
                continue
            if self.host is None:
                raise EngineError(
                    "the allocator moves blocks to the host, but the pool has no memory there; set allocator.swap_gib "
                    "or kv_cache.host_gib"
                )
            _check_ids(destinations if kind is CopyKind.SWAP_OUT else sources, self.num_swap_blocks + 1, kind)
            move = self.host.swap_out if kind is CopyKind.SWAP_OUT else self.host.swap_in
            move(sources, destinations)


def independent_runs(copies: Sequence[BlockCopy]) -> Iterator[tuple[CopyKind, list[int], list[int]]]:
    """Split copies into runs that may each be done as one batch: all reads, then all writes.

    A new run begins where the kind changes, and where a copy reads or writes a block that the run has written.

    Yields:
        kind, source ids and destination ids of each run.
    """
    kind: CopyKind | None = None
    sources: list[int] = []
    destinations: list[int] = []
    written: set[int] = set()
    for copy in copies:
        # A swap reads one memory and writes the other, so only its destinations can clash.
        clash = copy.dst in written or (copy.kind is CopyKind.DEVICE and copy.src in written)
        if kind is not None and (copy.kind is not kind or clash):
            yield kind, sources, destinations
            sources, destinations, written = [], [], set()
        kind = copy.kind
        sources.append(copy.src)
        destinations.append(copy.dst)
        written.add(copy.dst)
    if kind is not None:
        yield kind, sources, destinations


def blocks_for_budget(
    block_size: int,
    kv_bytes_per_token: int,
    *,
    num_blocks: int | None = None,
    num_slots: int | None = None,
    memory_gib: float | None = None,
    available_bytes: int | None = None,
) -> int:
    """Usable blocks of a pool, from exactly one of four statements of its size.

    Args:
        block_size: slots per block.
        kv_bytes_per_token: bytes of one slot, all layers together.
        num_blocks: usable blocks.
        num_slots: usable slots; a last part of a block is left out.
        memory_gib: GiB of the whole pool, the null block among them.
        available_bytes: the same in bytes: what a profiling forward left of the GPU's memory.

    Raises:
        ConfigError: not exactly one is given, or the pool cannot hold one block; the message says what to raise.
    """
    given = [value for value in (num_blocks, num_slots, memory_gib, available_bytes) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "give exactly one of kv_cache.num_blocks, kv_cache.num_slots and kv_cache.memory_gib "
            "(none of them only on a GPU, where engine.gpu_memory_utilization decides)"
        )
    check_int("allocator.block_size", block_size, 1)
    block_bytes = block_size * kv_bytes_per_token
    if num_blocks is not None:
        if num_blocks < 1:
            raise ConfigError(f"kv_cache.num_blocks={num_blocks} holds no block; raise it to at least 1")
        return num_blocks
    if num_slots is not None:
        if num_slots < block_size:
            raise ConfigError(
                f"kv_cache.num_slots={num_slots} is too small for one block of {block_size} slots; "
                f"raise it to at least {block_size}"
            )
        return num_slots // block_size
    if memory_gib is not None:
        fitting = int(memory_gib * GIB) // block_bytes - 1
        if fitting < 1:
            # Rounded up in the last printed digit, so that the printed number is enough.
            least = math.ceil(2 * block_bytes / GIB * 1e6) / 1e6
            raise ConfigError(
                f"kv_cache.memory_gib={memory_gib} is too small for one block of {block_size} slots and the null "
                f"block ({kv_bytes_per_token} bytes a slot); raise it to at least {least:.6f}"
            )
        return fitting
    available = max(0, available_bytes or 0)
    fitting = available // block_bytes - 1
    if fitting < 1:
        raise ConfigError(
            f"the weights leave {size_text(available)} for KV, and one block and the null block need "
            f"{size_text(2 * block_bytes)}; raise engine.gpu_memory_utilization, or take a smaller model"
        )
    return fitting


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, setting: str) -> Tensor:
    """Zeroed memory; a failure names the setting to lower."""
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise _no_room(error, device, math.prod(shape) * dtype.itemsize, setting) from error


def _no_room(error: BaseException, device: torch.device, asked: int, setting: str) -> EngineError:
    return EngineError(
        f"no memory on {device} for the KV pool: {asked_and_free(error, device, asked)}; lower {setting}"
    )


def _reserve(num_bytes: int, setting: str) -> Tensor:
    """Zeroed memory of the host, uint8 [num_bytes], that the system gives page by page as it is touched."""
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"no addresses for {size_text(num_bytes)} of virtual regions; lower allocator.max_regions, "
            f"engine.max_model_len or {setting}"
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8)


def _check_ids(ids: list[int], limit: int, kind: CopyKind) -> None:
    if min(ids) < 0 or max(ids) >= limit:
        bad = next(i for i in ids if not 0 <= i < limit)
        raise EngineError(
            f"a {kind.value} copy names block {bad}, outside 0..{limit - 1}; this is a bug of the allocator"
        )
