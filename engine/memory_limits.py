"""Memory that is not there: what was asked for and what was free, in figures that a person can compare."""

from __future__ import annotations

import re

import psutil
import torch

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_NUMBER = r"([\d.]+ [KMG]iB|\d+ bytes)"
# torch's allocator on a GPU, and on a CPU.
_ASKED = re.compile(rf"[Tt]ried to allocate {_NUMBER}")
_FREE = re.compile(rf"of which {_NUMBER} is free")
_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def size_text(num_bytes: int) -> str:
    """A size in the unit in which it has at least one digit before the point: 512 bytes, 1.50 MiB, 80.0 GiB."""
    for unit, factor in _UNITS:
        if abs(num_bytes) >= factor:
            value = num_bytes / factor
            return f"{value:.2f} {unit}" if abs(value) < 10 else f"{value:.1f} {unit}"
    return f"{num_bytes} bytes"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or this machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that nobody uses; on a CPU, what this machine can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def asked_and_free(error: BaseException, device: torch.device, asked: int | None = None) -> str:
    """What was asked for when `error` was raised, and what was free.

    Args:
        error: of which `is_out_of_memory` is true.
        device: where the memory was asked for.
        asked: bytes, where the caller knows; else torch's message says.
    """
    text = str(error)
    found, free = _ASKED.search(text), _FREE.search(text)
    wanted = size_text(asked) if asked is not None else _in_units(found[1]) if found else "more memory"
    left = free[1] if free else size_text(free_bytes(device))
    return f"{wanted} {'were' if wanted[0].isdigit() else 'was'} asked for and {left} were free"


def _in_units(text: str) -> str:
    number, unit = text.split()
    return size_text(int(number)) if unit == "bytes" else text
