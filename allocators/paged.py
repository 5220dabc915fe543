"""Paged KV: a request owns blocks wherever they lie (PagedAttention, Kwon et al., SOSP'23).

    request A   table [3, 7, 4]     pool  | null | ... | A0 | A2 | ... | A1 | ... |
                       |  |  |                           3    4          7
    positions   0..15 -+  |  +- 32..47

A block has one owner, or several after `fork`. Shared blocks are full and only read. A forked child writes at once, so
of the block that is half its own it gets a copy in the fork (copy on write).

    parent  [3, 7, 4]   fork   parent  [3, 7, 4]
                         ->    child   [3, 7, 9]      + copy 4 -> 9
                                        ^  ^ two references each
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from kvarena.allocators.blocks import BlockPool, BlockSpace
from kvarena.engine.contract import (
    NULL_BLOCK,
    BlockCopy,
    CopyKind,
    KVAllocator,
    KVUsage,
    QueueHead,
    Transfer,
    cdiv,
    check_int,
    check_number,
)
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request


class PagedAllocator(KVAllocator):
    """Blocks on demand, with copy-on-write forks, host swap and a sliding window.

    Args:
        swap_gib: host memory for the KV of preempted requests, in GiB; 0 has them recomputed.
        swap_blocks: the same in blocks, in place of `swap_gib`.
        pool: see KVAllocator; blocks that slid out of the window become the null block in the table.

    Raises:
        ConfigError: a size of host memory that is negative, stated twice, or in GiB of KV of unknown size.
    """

    def __init__(self, *, swap_gib: float = 0.0, swap_blocks: int | None = None, **pool: Any) -> None:
        super().__init__(**pool)
        self.commits = self.reads_tokens or self.sliding_window is not None
        swap_bytes = int(check_number("allocator.swap_gib", swap_gib) * 2**30)
        if swap_bytes and swap_blocks is not None:
            raise ConfigError("allocator.swap_gib and allocator.swap_blocks both size the host space; set one of them")
        if swap_bytes and not self.kv_bytes_per_token:
            raise ConfigError(
                f"allocator.swap_gib={swap_gib} cannot be turned into blocks without a model's KV size; "
                "set allocator.swap_blocks instead"
            )
        if swap_blocks is None:
            swap_blocks = swap_bytes // max(1, self.kv_bytes_per_token * self.block_size)
        self.num_host_blocks = check_int("allocator.swap_blocks", swap_blocks, 0)
        self._pool = BlockPool(1, self.num_blocks)
        self._tables: dict[Request, list[int]] = {}
        self._extra_refs: dict[int, int] = {}  # shared block -> its references beyond the first
        self._num_extra_refs = 0
        self._slid: dict[Request, int] = {}  # leading null entries of the tables that may have some
        self._host: BlockSpace = BlockPool(0, self.num_host_blocks)
        self._swapped: dict[Request, tuple[int, list[int]]] = {}  # leading null entries, and then host blocks
        self._copies: list[BlockCopy] = []

    @property
    def max_request_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return self._pool.num_free

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:  # noqa: ARG002
        """Add the missing blocks to the table."""
        table = self._tables.get(req) or []
        need = -(-num_tokens // self.block_size) - len(table)
        if need > self.num_free_blocks:
            return False
        if need > 0:
            table += self._pool.take(need)
        self._tables[req] = table
        req.num_slots = len(table) * self.block_size
        return True

    def free(self, req: Request) -> None:
        """Take the table apart, its last block first: what is given back last is handed out first."""
        req.num_slots = 0
        self._slid.pop(req, None)
        gone = self._release(reversed(self._tables.pop(req, ())))
        if self._copies:
            self._copies = _without_copies_into(gone, self._copies)
        self._pool.give(gone)
        self._host.give(self._swapped.pop(req, (0, ()))[1])

    def block_table(self, req: Request) -> Sequence[int]:
        """A live list: `allocate` and `commit` change it."""
        return self._tables[req]

    def drain_copies(self) -> list[BlockCopy]:
        """In order: what is copied out or back, of the pool or of host memory, may be handed out again at once."""
        copies, self._copies = self._copies, []
        return copies

    def _order(
        self, kind: CopyKind, sources: Iterable[int], targets: Iterable[int], transfer: Transfer | None = None
    ) -> None:
        self._copies += map(BlockCopy, repeat(kind), sources, targets, repeat(transfer))

    # ------------------------------------------------------------ sharing

    def fork(self, req: Request, child: Request, num_tokens: int | None = None) -> bool:
        """Share the full blocks of the first positions, and copy the one that is half the child's.

        The KV of the shared positions must be computed, or be computed by a step that was planned before the one
        in which `child` is first scheduled. False when `req` has not computed them, holds no token to share, or has
        slid past them, and without room for the copy.
        """
        num_shared = req.num_prompt_tokens - 1 if num_tokens is None else num_tokens
        num_full, num_half = divmod(num_shared, self.block_size)
        if not self._can_fork(req, num_shared) or (num_half and not self.num_free_blocks):
            return False
        table = self._sealed(req, num_full)
        self._tables[child] = shared = table[:num_full]
        self._slid[child] = num_slid = self._slid.get(req, 0)
        self._share(shared[num_slid:])
        if num_half:
            shared += self._pool.take(1)
            self._order(CopyKind.DEVICE, [table[num_full]], [shared[num_full]])
        child.num_computed_tokens = num_shared
        child.num_slots = len(shared) * self.block_size
        return True

    def _can_fork(self, req: Request, num_shared: int) -> bool:
        """Whether `req` holds the KV of its first `num_shared` positions, for a child to share."""
        if req not in self._tables or num_shared < 1 or req.num_computed_tokens < num_shared:
            return False
        return self._slid.get(req, 0) <= self._num_slid_at(num_shared)

    def _sealed(self, req: Request, num_blocks: int) -> list[int]:  # noqa: ARG002
        """`req`'s table, whose first `num_blocks` entries are to be shared as they are."""
        return self._tables[req]

    def _share(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each block."""
        for block in blocks:
            self._extra_refs[block] = self._extra_refs.get(block, 0) + 1
        self._num_extra_refs += len(blocks)

    def _release(self, blocks: Iterable[int]) -> list[int]:
        """Drop one reference to each block; returns those that nobody refers to any more."""
        gone = []
        for block in blocks:
            if block in self._extra_refs:
                self._num_extra_refs -= 1
                self._extra_refs[block] -= 1
                if not self._extra_refs[block]:
                    del self._extra_refs[block]
            elif block != NULL_BLOCK:
                gone.append(block)
        return gone

    # ------------------------------------------------------------ sliding window

    def _num_slid_at(self, num_computed: int) -> int:
        """Leading blocks that no position from `num_computed` on attends to."""
        if self.sliding_window is None:
            return 0
        return max(0, num_computed - self.sliding_window + 1) // self.block_size

    def commit(self, req: Request) -> None:
        before, num_slid = self._slid.get(req, 0), self._num_slid_at(req.num_computed_tokens)
        if num_slid > before:
            table = self._tables[req]
            slid, table[before:num_slid] = table[before:num_slid], [NULL_BLOCK] * (num_slid - before)
            self._slid[req] = num_slid
            self._pool.give(self._release(slid))

    # ------------------------------------------------------------ swap

    def swap_out(self, req: Request) -> bool:
        """Copy the computed blocks to host memory and free all blocks. False: no room there, or nothing computed."""
        num_slid = self._slid.get(req, 0)
        blocks = self._tables.get(req, [])[num_slid : cdiv(req.num_computed_tokens, self.block_size)]
        if not blocks or len(blocks) > self._host.num_free:
            return False
        host = self._host.take(len(blocks))
        self._order(CopyKind.SWAP_OUT, blocks, host)
        self.free(req)
        self._swapped[req] = num_slid, host
        return True

    def swap_in(self, req: Request) -> bool:
        """Copy a swapped request's blocks back into blocks of its own. False: no room, nothing changed."""
        num_slid, host = self._swapped.get(req, (0, []))
        if not host or len(host) > self.num_free_blocks:
            return False
        blocks = self._pool.take(len(host))
        self._order(CopyKind.SWAP_IN, host, blocks)
        del self._swapped[req]
        self._host.give(host)
        self._tables[req] = table = [NULL_BLOCK] * num_slid + blocks
        self._slid[req] = num_slid
        req.num_slots = len(table) * self.block_size
        return True

    # ------------------------------------------------------------ ledger

    def slots_to_admit(self, head: QueueHead) -> int:
        """Whole blocks, less those that the head brings along (slid out, swapped) or shares (its parent's, hits)."""
        num_blocks = cdiv(head.num_tokens, self.block_size)
        if head.req in self._swapped:
            num_blocks -= self._swapped[head.req][0]
        elif head.parent is not None and self._can_fork(head.parent, head.num_shared):
            num_blocks -= head.num_shared // self.block_size
        else:
            num_blocks -= self._num_shared_hits(head.req)
        return num_blocks * self.block_size

    def _num_shared_hits(self, req: Request) -> int:  # noqa: ARG002
        """Blocks that admission would find in a prefix cache and share with running requests."""
        return 0

    def count(self) -> KVUsage:
        """External is 0: any free block serves any request. Cached are the blocks that `allocate` would evict."""
        block_size, num_free = self.block_size, self._pool.num_free
        num_cached = self.num_free_blocks - num_free
        # Shared blocks are full, so each extra reference counts one block of computed tokens too many.
        num_twice = self._num_extra_refs + sum(self._slid.values())
        return KVUsage(
            total=self.num_blocks * block_size,
            computed=sum([req.num_computed_tokens for req in self._tables]) - num_twice * block_size,
            owned=(self.num_blocks - num_free - num_cached) * block_size,
            cached=num_cached * block_size,
            free=num_free * block_size,
            shared_saved=self._num_extra_refs * block_size,
        )


def _without_copies_into(blocks: Iterable[int], copies: Sequence[BlockCopy]) -> list[BlockCopy]:
    """`copies` less those into device blocks that nobody owns any more, unless a later copy reads the block."""
    dead = set(blocks)
    kept = []
    for copy in reversed(copies):
        if copy.dst in dead and copy.kind is not CopyKind.SWAP_OUT:
            continue
        if copy.kind is not CopyKind.SWAP_IN:
            dead.discard(copy.src)
        kept.append(copy)
    return kept[::-1]
