"""CUDA's virtual memory management as a `MemoryDriver`, through NVIDIA's Python binding of the driver.

The binding, cuda-bindings, comes with the CUDA wheels of PyTorch, and with `pip install 'kvarena[gpu]'`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.errors import ConfigError, EngineError

HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the device has no memory left",
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or its driver cannot map memory: use allocator=contiguous or paged",
    "CUDA_ERROR_NOT_PERMITTED": "this GPU or its driver cannot map memory: use allocator=contiguous or paged",
}


def call(bindings: Any, name: str, *args: Any) -> Any:
    """Call a function of the binding; returns what it gives beside its error code.

    Raises:
        EngineError: the code is an error; the message names the function and the code.
    """
    error, *values = getattr(bindings, name)(*args)
    if error != bindings.CUresult.CUDA_SUCCESS:
        hint = HINTS.get(error.name)
        raise EngineError(f"{name} failed with {error.name}" + (f": {hint}" if hint else ""))
    return values[0] if values else None


class StreamFence:
    """A fence behind the work of a stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for the work, if it is not over."""
        self._event.synchronize()


class _Range:
    """An address range that other libraries can wrap without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class CudaDriver:
    """`MemoryDriver` of one GPU.

    Args:
        device: the GPU.

    Raises:
        ConfigError: the binding is not installed.
        EngineError: the driver refuses.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ConfigError(
                "allocator=virtual maps GPU memory with the package cuda-bindings, which is not installed; run "
                "pip install 'kvarena[gpu]'"
            ) from error
        torch.cuda.synchronize(device)  # initialises the driver
        self._bindings = driver
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = self._device.index
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = self._device.index
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        smallest = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(call(driver, "cuMemGetAllocationGranularity", self._properties, smallest))

    def reserve(self, num_bytes: int) -> int:
        """See `MemoryDriver`."""
        return int(call(self._bindings, "cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """See `MemoryDriver`."""
        call(self._bindings, "cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> Any:
        """See `MemoryDriver`."""
        return call(self._bindings, "cuMemCreate", num_bytes, self._properties, 0)

    def release(self, handle: Any) -> None:
        """See `MemoryDriver`."""
        call(self._bindings, "cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """See `MemoryDriver`."""
        call(self._bindings, "cuMemMap", address, num_bytes, 0, handle, 0)

    def set_access(self, address: int, num_bytes: int) -> None:
        """See `MemoryDriver`."""
        call(self._bindings, "cuMemSetAccess", address, num_bytes, [self._access], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See `MemoryDriver`."""
        call(self._bindings, "cuMemUnmap", address, num_bytes)

    def fence(self) -> StreamFence:
        """See `MemoryDriver`."""
        return StreamFence(self._device)

    def tensor(self, address: int, num_bytes: int, on_free: Callable[[], None]) -> Tensor:
        """See `MemoryDriver`."""
        memory = _Range(address, num_bytes)
        tensor = torch.as_tensor(memory, device=self._device)
        if tensor.data_ptr() != address:
            raise EngineError("torch copied mapped memory in place of wrapping it; use allocator=contiguous or paged")
        # The tensor's storage holds `memory`. At exit the driver may be gone, and gives everything back by itself.
        weakref.finalize(memory, on_free).atexit = False
        return tensor
