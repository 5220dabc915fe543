"""Blocks that are copied: within the pool, and between it and the host memory below. Free of torch.

copies of a step, in list order | the step's forward | ...
    made before the forward        those of a transfer may take longer: it says when they have arrived
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class CopyKind(Enum):
    """Where a block copy reads and writes."""

    DEVICE = "device"  # pool -> pool (copy-on-write, relocation)
    SWAP_OUT = "swap_out"  # pool -> host
    SWAP_IN = "swap_in"  # host -> pool


class Transfer:
    """Copies of one direction that may be made while steps compute.

    Attributes:
        arrival: when all of them are made, in seconds on the engine's clock, which may lie ahead; None: not known. The
            runner sets it, once nothing can keep them from being made.
    """

    __slots__ = ("arrival",)

    def __init__(self) -> None:
        self.arrival: float | None = None


class BlockCopy(NamedTuple):
    """Copy one block of KV in every layer; applied before the step's forward, in list order.

    With a transfer only what the pool gives is read by then: host blocks on either side, and the pool's block that it
    writes, may be touched until it has arrived.
    """

    kind: CopyKind
    src: int
    dst: int
    transfer: Transfer | None = None


def arrive_in_order(copies: Iterable[BlockCopy]) -> None:
    """Transfers of a runner that makes all copies before whatever it launches next: they have arrived."""
    for copy in copies:
        if copy.transfer is not None:
            copy.transfer.arrival = float("-inf")
