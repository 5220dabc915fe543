"""A KV pool over reserved addresses, backed page by page as requests grow: vAttention (Prabhu et al., ASPLOS'25).

    keys   [slots, num_layers, num_kv_heads, head_dim]   the paper's tensor slicing: a token's keys of all layers lie
    values [slots, num_layers, num_kv_heads, head_dim]   side by side, so a page of 2 MiB holds as few tokens as it can

A layer is a strided view of that, and the contiguous kernel reads it as it reads any pool. Which slots a request owns
is the allocator's word (`Request.num_slots`, and the first entry of its block table); the pool maps what they need
before the step that writes them, and learns from the runner who has left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvarena.engine.contract import BlockCopy, KVAllocator, StepPlan, cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.pool.cuda_memory import CudaDriver
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.virtual_memory import MemoryDriver, PageMap
from kvarena.engine.request import Request


@dataclass(slots=True)
class _Stay:
    """A request's region: its first page, and how many slots of it are backed."""

    start: int
    num_slots: int


class VirtualKVPool(KVPool):
    """A `KVPool` of `num_blocks` virtual blocks with `num_pages` pages behind them.

    Reads of slots that nobody owns are faults: kernels must mask them, as the Triton ones do. Memory is not zeroed.

    Args:
        num_pages: pages for requests; those of the null block come on top.
        page_bytes: size of a page among the keys, and of its twin among the values.
        driver: maps the memory; None takes CUDA's.
        shape: the arguments of `KVPool`; `num_blocks` is the largest virtual id.

    Raises:
        ConfigError: the driver's binding is missing, or the device has no pages of that size.
        EngineError: the device has no room for so many pages.
    """

    def __init__(self, *, num_pages: int, page_bytes: int, driver: MemoryDriver | None = None, **shape: Any) -> None:
        self._num_pages = num_pages
        self._page_bytes = page_bytes
        self._driver = driver
        self._stays: dict[str, _Stay] = {}
        self._owners: dict[int, str] = {}
        super().__init__(**shape)

    def _make_data(self, shape: tuple[int, ...]) -> Tensor:
        _, num_layers, num_slots, num_kv_heads, head_dim = shape
        slot_size = num_layers * num_kv_heads * head_dim
        self._slot_bytes = slot_size * self.dtype.itemsize
        plane_bytes = cdiv(num_slots * self._slot_bytes, self._page_bytes) * self._page_bytes
        null_pages = cdiv(self.block_size * self._slot_bytes, self._page_bytes)
        self.pages = PageMap(
            self._driver or CudaDriver(self.device),
            num_pages=self._num_pages + null_pages,
            page_bytes=self._page_bytes,
            plane_bytes=plane_bytes,
            sized_by=self.sized_by,
        )
        self._num_bytes = 2 * (self._num_pages + null_pages) * self._page_bytes
        self.pages.grow(0, null_pages)
        memory = self.pages.tensor()
        strides = (plane_bytes // self.dtype.itemsize, num_kv_heads * head_dim, slot_size, head_dim, 1)
        return memory.view(self.dtype).as_strided(shape, strides)

    @property
    def num_bytes(self) -> int:
        """Bytes of physical memory, that of the null block among them."""
        return self._num_bytes

    def begin_step(self, plan: StepPlan, allocator: KVAllocator) -> None:
        """Map what the step's requests own and has no memory yet.

        Raises:
            EngineError: the allocator hands out more than there is, or the driver refuses.
        """
        if plan.preempted or plan.rejected:
            self.release(req.request_id for req in (*plan.preempted, *plan.rejected))
        for req, _, _ in plan.scheduled:
            stay = self._stays.get(req.request_id)
            if stay is None:
                stay = self._enter(req, allocator)
            if req.num_slots > stay.num_slots:
                self.pages.grow(stay.start, cdiv(req.num_slots * self._slot_bytes, self._page_bytes))
                stay.num_slots = req.num_slots

    def release(self, request_ids: Iterable[str]) -> None:
        """These requests own nothing any more; their pages may go to others. Idempotent."""
        left = [stay.start for request_id in request_ids if (stay := self._stays.pop(request_id, None))]
        if left:
            for start in left:
                del self._owners[start]
            self.pages.release(left)

    def apply_copies(self, copies: Sequence[BlockCopy]) -> None:
        """Regions are neither shared nor swapped, so there is nothing to copy."""
        if copies:
            raise EngineError("a virtual KV pool was asked to copy blocks; this is a bug of the allocator")

    def _enter(self, req: Request, allocator: KVAllocator) -> _Stay:
        first_byte = allocator.block_table(req)[0] * self.block_size * self._slot_bytes
        start, rest = divmod(first_byte, self._page_bytes)
        if rest or start in self._owners:
            wrong = "begins inside a page" if rest else f"request {self._owners[start]!r} is in"
            raise EngineError(
                f"request {req.request_id!r} got a region that {wrong}; this is a bug of the allocator or the runner"
            )
        self._owners[start] = req.request_id
        stay = self._stays[req.request_id] = _Stay(start, 0)
        return stay
