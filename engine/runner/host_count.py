"""A count on its way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.sampling.output import to_pinned


class HostCount:
    """Starts the copy of a count to the host without waiting for it.

    Args:
        count: integer [].
    """

    def __init__(self, count: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._count = count
        if count.device.type == "cuda":
            self._count = to_pinned(count)
            self._done = torch.cuda.Event()
            self._done.record()

    def result(self) -> int:
        """The count; waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        return int(self._count)
