"""Two drivers of virtual memory for machines without a GPU: one that only judges, one that really maps."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from kvarena.engine.errors import EngineError

KIB = 1024


class FakeFence:
    def __init__(self, driver: FakeDriver, num_launched: int) -> None:
        self._driver = driver
        self._num_launched = num_launched

    def wait(self) -> None:
        self._driver.num_done = max(self._driver.num_done, self._num_launched)


class FakeDriver:
    """Keeps the books, and fails the test where CUDA would fail, or would let one step read another's memory.

    Args:
        num_handles: physical allocations that fit.
        fail_at: (function, n): its n-th call from 0 is refused.
    """

    def __init__(self, num_handles: int = 10**6, fail_at: tuple[str, int] | None = None) -> None:
        self.granularity = 64 * KIB
        self.num_handles = num_handles
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}  # address -> handle
        self.accessible: set[int] = set()
        self.range: tuple[int, int] | None = None
        self.in_flight: list[tuple[int, set[int]]] = []  # (step, addresses that it uses)
        self.num_launched = self.num_done = 0
        self.calls: list[str] = []
        self._fail_at = fail_at
        self._names = itertools.count(1)

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if self._fail_at == (name, self.calls.count(name) - 1):
            raise EngineError(f"{name} failed with CUDA_ERROR_UNKNOWN")

    def launch(self, addresses: set[int]) -> None:
        """A step begins that uses these pages."""
        assert addresses <= self.accessible, "a fault: the step uses what is not mapped"
        self.num_launched += 1
        self.in_flight.append((self.num_launched, addresses))

    def reserve(self, num_bytes: int) -> int:
        self._note("reserve")
        assert self.range is None and num_bytes % self.granularity == 0
        self.range = (1 << 40, num_bytes)
        return self.range[0]

    def free(self, address: int, num_bytes: int) -> None:
        self._note("free")
        assert self.range == (address, num_bytes) and not self.mapped
        self.range = None

    def create(self, num_bytes: int) -> int:
        self._note("create")
        assert num_bytes % self.granularity == 0
        if len(self.handles) == self.num_handles:
            raise EngineError("cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY")
        handle = next(self._names)
        self.handles.add(handle)
        return handle

    def release(self, handle: int) -> None:
        self._note("release")
        assert handle not in self.mapped.values()
        self.handles.remove(handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        self._note("map")
        assert self.range is not None and self.range[0] <= address <= sum(self.range) - num_bytes
        assert (address - self.range[0]) % num_bytes == 0 and handle in self.handles
        assert address not in self.mapped, "there is a page already"
        assert handle not in self.mapped.values(), "a page is in two places"
        self.mapped[address] = handle

    def set_access(self, address: int, num_bytes: int) -> None:
        self._note("set_access")
        pages = {page for page in self.mapped if address <= page < address + num_bytes}
        assert len(pages) == num_bytes // self.granularity
        self.accessible |= pages

    def unmap(self, address: int, num_bytes: int) -> None:
        self._note("unmap")
        assert num_bytes == self.granularity
        running = [pages for step, pages in self.in_flight if step > self.num_done]
        assert not any(address in pages for pages in running), "a step in flight may read this page"
        del self.mapped[address]
        self.accessible.discard(address)

    def fence(self) -> FakeFence:
        return FakeFence(self, self.num_launched)

    def tensor(self, address: int, num_bytes: int, on_free: Callable[[], None]) -> Tensor:
        raise NotImplementedError("there is no memory")


class _Done:
    def wait(self) -> None:
        pass


class HostDriver:
    """Host memory that is really mapped and unmapped: a page is a part of an anonymous file.

    An access to what is not mapped ends the process, as it ends a CUDA context.
    """

    def __init__(self, granularity: int = 64 * KIB) -> None:
        self.granularity = granularity
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._file = os.memfd_create("pages")
        self._size = 0
        self.num_live = 0

    def _mmap(self, address: int | None, num_bytes: int, flags: int, file: int, offset: int) -> int:
        at = self._libc.mmap(address, num_bytes, 0, flags, file, offset)
        assert at not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return at

    def reserve(self, num_bytes: int) -> int:
        no_reserve = 0x4000
        return self._mmap(None, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve, -1, 0)

    def free(self, address: int, num_bytes: int) -> None:
        assert self._libc.munmap(address, num_bytes) == 0

    def create(self, num_bytes: int) -> int:
        offset = self._size
        self._size += num_bytes
        os.ftruncate(self._file, self._size)
        # What a masked read must not pick up: NaN in every float format.
        os.pwrite(self._file, b"\xff" * num_bytes, offset)
        self.num_live += 1
        return offset

    def release(self, handle: int) -> None:
        self.num_live -= 1

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        fixed = 0x10
        assert self._mmap(address, num_bytes, mmap.MAP_SHARED | fixed, self._file, handle) == address

    def set_access(self, address: int, num_bytes: int) -> None:
        assert self._libc.mprotect(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE) == 0

    def unmap(self, address: int, num_bytes: int) -> None:
        flags = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        assert self._mmap(address, num_bytes, flags, -1, 0) == address

    def fence(self) -> _Done:
        return _Done()

    def tensor(self, address: int, num_bytes: int, on_free: Callable[[], None]) -> Tensor:
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, on_free).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)
