"""Physical pages mapped into regions of a reserved address range. Free of torch.

    plane 0 (keys)    | null |####|####|    |    |####|    |    |    |      # mapped
    plane 1 (values)  | null |####|####|    |    |####|    |    |    |
                             ^ a region          ^ another

A page is one physical allocation in each plane, at the same place of both. All are made at the start, so that no step
finds the memory taken by others; afterwards they only move. Pages of a region that was released stay mapped: the next
request in that region finds them, and others get them when nothing else is free (vAttention's deferred reclamation).
Unmapping is not ordered with the work on a stream, so a page is unmapped only when every step that was launched before
its region was released is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.pool.memory_limits import size_text

if TYPE_CHECKING:
    from torch import Tensor

Page = tuple[Any, ...]  # a handle for each plane


class Fence(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Return when all that was launched before the fence is over."""
        ...


class MemoryDriver(Protocol):
    """Virtual memory management, after CUDA's calls. Sizes and addresses are multiples of `granularity`, in bytes.

    Every call raises EngineError where the driver refuses.

    Attributes:
        granularity: the smallest page.
    """

    granularity: int

    def reserve(self, num_bytes: int) -> int:
        """An address range with nothing behind it; returns its start."""
        ...

    def free(self, address: int, num_bytes: int) -> None:
        """Give the whole range back; nothing is mapped in it."""
        ...

    def create(self, num_bytes: int) -> Any:
        """Physical memory; returns its handle."""
        ...

    def release(self, handle: Any) -> None:
        """Give physical memory back; it is mapped nowhere."""
        ...

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Put the memory of `handle` at `address`."""
        ...

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let the device read and write a range that is mapped as a whole."""
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one `map`."""
        ...

    def fence(self) -> Fence:
        """A fence behind what has been launched."""
        ...

    def tensor(self, address: int, num_bytes: int, on_free: Callable[[], None]) -> Tensor:
        """The range as uint8 [num_bytes]; its first page is mapped. `on_free` runs when no tensor uses it any more."""
        ...


@dataclass(slots=True)
class _Region:
    """Pages mapped from the front of a region.

    Attributes:
        pages: in order.
        num_needed: so many of them, from the front, are in use.
        fence: behind the last step that may use one of the others; None: it is over.
    """

    pages: list[Page] = field(default_factory=list)
    num_needed: int = 0
    fence: Fence | None = None


class PageMap:
    """Maps pages into regions. A region is named by the number of its first page in the range.

    Args:
        driver: the calls.
        num_pages: physical pages.
        page_bytes: size of a page in each plane.
        plane_bytes: address range of a plane.
        num_planes: tensors that a token is spread over.
        sized_by: the setting that says how many pages there are, for the error.

    Attributes:
        address: where the range starts.
        num_free: pages that are mapped nowhere.
        num_mapped, num_unmapped: how often a page was mapped and unmapped so far.

    Raises:
        ConfigError: `page_bytes` is no page of this device.
        EngineError: the device has no room for so many pages.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        *,
        num_pages: int,
        page_bytes: int,
        plane_bytes: int,
        num_planes: int = 2,
        sized_by: str = "kv_cache.num_blocks, num_slots or memory_gib",
    ) -> None:
        if page_bytes % driver.granularity:
            raise ConfigError(
                f"allocator.page_bytes={page_bytes} cannot be mapped: this device maps pages of {driver.granularity} "
                "bytes; set it to that, or to a multiple of it"
            )
        self._driver = driver
        self._page_bytes = page_bytes
        self._plane_bytes = plane_bytes
        self._num_planes = num_planes
        self._regions: dict[int, _Region] = {}
        self._spare: dict[int, None] = {}  # regions with pages that they do not need, the one released first first
        self._handles: list[Any] = []
        self._free: list[Page] = []
        self.num_mapped = self.num_unmapped = 0
        self._is_open = True
        self.address = driver.reserve(num_planes * plane_bytes)
        try:
            for _ in range(num_pages):
                for _ in range(num_planes):
                    self._handles.append(driver.create(page_bytes))
                self._free.append(tuple(self._handles[-num_planes:]))
        except EngineError as error:
            asked, made = num_pages * num_planes * page_bytes, len(self._handles) * page_bytes
            self.close()
            raise EngineError(
                f"no memory for the KV pool: {size_text(asked)} of pages were asked for and {size_text(made)} of them "
                f"were free ({error}); lower {sized_by}"
            ) from error

    @property
    def num_free(self) -> int:
        """Pages that are mapped nowhere."""
        return len(self._free)

    def grow(self, start: int, num_pages: int) -> None:
        """Back the first `num_pages` pages of region `start`; never fewer than before.

        Raises:
            EngineError: more pages are in use than there are, or the driver refuses.
        """
        region = self._regions.setdefault(start, _Region())
        region.num_needed = max(region.num_needed, num_pages)
        if region.num_needed >= len(region.pages):
            self._spare.pop(start, None)
        missing = num_pages - len(region.pages)
        if missing > 0:
            pages = self._take(missing)
            self._map(start + len(region.pages), pages)
            region.pages += pages

    def release(self, starts: Iterable[int]) -> None:
        """These regions are in use no longer; the steps launched so far may still read them."""
        fence = self._driver.fence()
        for start in starts:
            region = self._regions[start]
            region.num_needed, region.fence = 0, fence
            self._spare.pop(start, None)
            self._spare[start] = None

    def tensor(self) -> Tensor:
        """The whole range as uint8; its first page must be backed. Without a tensor on it, all is given back."""
        return self._driver.tensor(self.address, self._num_planes * self._plane_bytes, self.close)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._driver.fence().wait()
        for start, region in self._regions.items():
            self._unmap(start, len(region.pages))
        self._regions.clear()
        self._spare.clear()
        self._free.clear()
        for handle in self._handles:
            self._driver.release(handle)
        self._driver.free(self.address, self._num_planes * self._plane_bytes)

    def _take(self, num_pages: int) -> list[Page]:
        while len(self._free) < num_pages and self._spare:
            self._reclaim(next(iter(self._spare)), num_pages - len(self._free))
        if len(self._free) < num_pages:
            total = len(self._handles) // self._num_planes
            raise EngineError(
                f"{num_pages} more pages of KV are wanted, and {total - len(self._free)} of {total} are in use; the "
                "allocator counts other pages than the pool has: a bug of the one who built them"
            )
        taken = self._free[-num_pages:]
        del self._free[-num_pages:]
        return taken

    def _reclaim(self, start: int, most: int) -> None:
        """Take pages that a region does not need, from its end."""
        region = self._regions[start]
        if region.fence is not None:
            region.fence.wait()
            region.fence = None
        count = min(most, len(region.pages) - region.num_needed)
        kept = len(region.pages) - count
        self._unmap(start + kept, count)
        self._free += region.pages[kept:]
        del region.pages[kept:]
        if kept == region.num_needed:
            del self._spare[start]
            if not kept:
                del self._regions[start]

    def _map(self, first: int, pages: list[Page]) -> None:
        """Map pages side by side; all or none."""
        done: list[int] = []
        try:
            for plane in range(self._num_planes):
                begin = self._address(plane, first)
                for index, page in enumerate(pages):
                    self._driver.map(begin + index * self._page_bytes, self._page_bytes, page[plane])
                    done.append(begin + index * self._page_bytes)
                self._driver.set_access(begin, len(pages) * self._page_bytes)
        except EngineError:
            for address in done:
                self._driver.unmap(address, self._page_bytes)
            self._free += pages
            raise
        self.num_mapped += len(pages)

    def _unmap(self, first: int, num_pages: int) -> None:
        for plane in range(self._num_planes):
            begin = self._address(plane, first)
            for index in range(num_pages):
                self._driver.unmap(begin + index * self._page_bytes, self._page_bytes)
        self.num_unmapped += num_pages

    def _address(self, plane: int, page: int) -> int:
        return self.address + plane * self._plane_bytes + page * self._page_bytes
