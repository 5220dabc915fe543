"""Memory that a server's processes share. It has no name: however they end, nothing of it is left."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from multiprocessing import reduction
from typing import Any


class Page:
    """A piece of shared memory; a process that is spawned with it as an argument sees the same bytes.

    Args:
        file: its file descriptor, which the page owns.
    """

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def of_size(cls, num_bytes: int) -> Page:
        """A new page of zeros."""
        if sys.platform == "linux":
            page = cls(os.memfd_create("kvarena-page"))
        else:
            with tempfile.TemporaryFile() as file:
                page = cls(os.dup(file.fileno()))
        os.truncate(page._file, num_bytes)
        return page

    def map(self) -> mmap.mmap:
        """The page's bytes."""
        return mmap.mmap(self._file, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawning hands the descriptor on."""
        return _received, (reduction.DupFd(self._file),)


def _received(file: Any) -> Page:
    return Page(file.detach())
