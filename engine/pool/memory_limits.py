"""Memory that is not there: what was asked for and what was free, in figures that a person can compare."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_NUMBER = r"([\d.]+ [KMG]iB|\d+ bytes)"
# torch's allocator on a GPU, and on a CPU.
_ASKED = re.compile(rf"[Tt]ried to allocate {_NUMBER}")
_FREE = re.compile(rf"of which {_NUMBER} is free")
_ENDLESS = 2**60  # a limit beyond it is none
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
    """Memory of `device` that nobody uses; on a CPU, what the machine, or this container, can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), *_group_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _group_rooms(own: Path, root: Path) -> list[int]:
    """Bytes that the limits of this process's control groups leave, those of a container among them.

    Args:
        own: names the groups, a line `number:controllers:path` each.
        root: where the groups are shown.
    """
    rooms = [_ENDLESS]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container shows its own group as the root, whatever its path is called outside.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            rooms += _group_room(folder, limit, used)
    return rooms


def _group_room(folder: Path, limit: str, used: str) -> list[int]:
    """What one group leaves; empty where it has no limit. File pages that nobody has read of late count as free."""
    if not (folder / limit).exists():
        return []
    most = (folder / limit).read_text().strip()
    if most == "max" or int(most) >= _ENDLESS:
        return []
    pages = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    return [max(0, int(most) - int((folder / used).read_text()) + (int(pages[1]) if pages else 0))]


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
