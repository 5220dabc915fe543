"""Imports of large libraries, at the start of a process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within the block nothing is looked through for garbage; what exists at its end never will be.

    A start makes some millions of objects that live as long as the process. Collections pass over them again and again:
    a fifth of the time that importing torch and transformers takes, and 0.3 s for each full one later. For what imports
    at the start of a process and nothing else: garbage within the block stays for good.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
