"""Says what takes the first seconds. Imports nothing that takes time."""

from __future__ import annotations

import sys


def say_loading(*, enabled: bool) -> None:
    """Say, before torch is imported, what takes seconds from here on (on a slow disk many)."""
    if enabled and "torch" not in sys.modules:
        print("loading PyTorch ...", file=sys.stderr, flush=True)
