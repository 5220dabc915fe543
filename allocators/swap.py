"""Copies that the runner still has to make, and the blocks of host memory that swapped requests own.

Copies are applied in list order before the next forward, so a device block that is copied out may be handed out
again at once. A host block that was given back is handed out again only after the next `drain_copies`: within one
drain no host block is written for two requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvarena.allocators.blocks import BlockPool
from kvarena.engine.contract import BlockCopy, CopyKind, check_int, is_number, require
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request


class CopyQueue:
    """Copies ordered since the last drain, in order."""

    def __init__(self) -> None:
        self._copies: list[BlockCopy] = []

    def __bool__(self) -> bool:
        return bool(self._copies)

    def order(self, kind: CopyKind, sources: Iterable[int], targets: Iterable[int]) -> None:
        """Append one copy per pair."""
        self._copies += [BlockCopy(kind, src, dst) for src, dst in zip(sources, targets, strict=True)]

    def cancel(self, blocks: Iterable[int]) -> None:
        """Drop the copies into device blocks that nobody owns any more, unless a later copy reads the block."""
        dead = set(blocks)
        kept = []
        for copy in reversed(self._copies):
            if copy.dst in dead and copy.kind is not CopyKind.SWAP_OUT:
                continue
            if copy.kind is not CopyKind.SWAP_IN:
                dead.discard(copy.src)
            kept.append(copy)
        self._copies = kept[::-1]

    def drain(self) -> list[BlockCopy]:
        """The copies, oldest first; forgets them."""
        copies, self._copies = self._copies, []
        return copies


class SwappedTable(NamedTuple):
    """The block table of a swapped request: `num_slid` null blocks (slid out of the window), and then host blocks."""

    num_slid: int
    host_blocks: list[int]


class HostPool:
    """Host blocks, ids 0..num_blocks - 1, and who owns them."""

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(0, num_blocks)
        self._tables: dict[Request, SwappedTable] = {}
        self._resting: list[int] = []  # given back, but perhaps read or written by an undrained copy

    @property
    def num_free(self) -> int:
        """Host blocks that can be taken now."""
        return self._pool.num_free

    def store(self, req: Request, num_slid: int, num_blocks: int) -> list[int]:
        """Take `num_blocks` host blocks for what follows the first `num_slid` entries of `req`'s table."""
        self._tables[req] = table = SwappedTable(num_slid, self._pool.take(num_blocks))
        return table.host_blocks

    def lookup(self, req: Request) -> SwappedTable | None:
        """What `req` owns here."""
        return self._tables.get(req)

    def release(self, req: Request) -> None:
        """Give `req`'s host blocks back. Idempotent."""
        if req in self._tables:
            self._resting += self._tables.pop(req).host_blocks

    def settle(self) -> None:
        """The copies were drained: what was given back may be handed out again."""
        self._pool.give(self._resting)
        self._resting = []


def host_blocks(swap_gib: float, swap_blocks: int | None, block_size: int, kv_bytes_per_token: int) -> int:
    """Number of host blocks, from `swap_blocks` or from `swap_gib`.

    Raises:
        ConfigError: negative, both given, or GiB of KV of unknown size.
    """
    is_size = is_number(swap_gib) and swap_gib >= 0
    require(is_size, "allocator.swap_gib", swap_gib, "at least 0 (GiB; 0 recomputes instead of swapping)")
    if swap_blocks is not None:
        if swap_gib:
            raise ConfigError("allocator.swap_gib and allocator.swap_blocks both size the host space; set one of them")
        return check_int("allocator.swap_blocks", swap_blocks, 0)
    if swap_gib and not kv_bytes_per_token:
        raise ConfigError(
            f"allocator.swap_gib={swap_gib} cannot be turned into blocks without a model's KV size; "
            "set allocator.swap_blocks instead"
        )
    return int(swap_gib * 2**30) // (kv_bytes_per_token * block_size) if swap_gib else 0
