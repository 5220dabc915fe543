"""Paged KV: a request owns blocks wherever they lie (PagedAttention, Kwon et al., SOSP'23).

    request A   table [3, 7, 4]     pool  | null | ... | A0 | A2 | ... | A1 | ... |
                       |  |  |                           3    4          7
    positions   0..15 -+  |  +- 32..47

A block has one owner, or several after `fork`. Shared blocks are only read: a request that is about to write into
one gets a copy of its own first, in `allocate`.

    parent  [3, 7, 4]          parent  [3, 7, 4]
    child   [3, 7, 4]   ->     child   [3, 7, 9]      + copy 4 -> 9, when the child writes into its last block
             ^  ^  ^ two references each
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvarena.allocators.blocks import BlockPool
from kvarena.allocators.swap import CopyQueue, HostPool, host_blocks
from kvarena.engine.contract import NULL_BLOCK, BlockCopy, CopyKind, KVAllocator, KVUsage, QueueHead, cdiv
from kvarena.engine.request import Request


class PagedAllocator(KVAllocator):
    """Blocks on demand, with copy-on-write forks, host swap and a sliding window.

    Args:
        swap_gib: host memory for the KV of preempted requests, in GiB; 0 has them recomputed.
        swap_blocks: the same in blocks, in place of `swap_gib`.
        pool: see KVAllocator; blocks that slid out of the window become the null block in the table.
    """

    def __init__(self, *, swap_gib: float = 0.0, swap_blocks: int | None = None, **pool: Any) -> None:
        super().__init__(**pool)
        self.commits = self.reads_tokens or self.sliding_window is not None
        self.num_host_blocks = host_blocks(swap_gib, swap_blocks, self.block_size, self.kv_bytes_per_token)
        self._host = HostPool(self.num_host_blocks)
        self._copies = CopyQueue()
        self._pool = BlockPool(1, self.num_blocks)
        self._tables: dict[Request, list[int]] = {}
        self._extra_refs: dict[int, int] = {}  # shared block -> its references beyond the first
        self._num_extra_refs = 0
        self._forked: set[Request] = set()  # requests whose next write may hit a shared block
        self._slid: dict[Request, int] = {}  # leading null entries of the tables that have some

    @property
    def max_request_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return self._pool.num_free

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Add the missing blocks to the table, and copy a shared block that `req` writes next."""
        table = self._tables.get(req)
        if table is None:
            return self._admit(req, num_tokens, num_cached)
        block_size = self.block_size
        need = max(0, -(-num_tokens // block_size) - len(table))
        copy = self._forked and self._writes_shared(req, table)
        if need + bool(copy) > self.num_free_blocks:
            return False
        if copy:
            self._copy_on_write(req, table)
        if need:
            table.extend(self._take(need))
        req.num_slots = len(table) * block_size
        return True

    def free(self, req: Request) -> None:
        req.num_slots = 0
        table = self._tables.get(req)
        if table is not None:
            self._drop(req, table, cancel_copies=True)
        elif self.num_host_blocks:
            self._host.release(req)

    def block_table(self, req: Request) -> Sequence[int]:
        """A live list: `allocate` and `commit` change it."""
        return self._tables[req]

    def drain_copies(self) -> list[BlockCopy]:
        self._host.settle()
        return self._copies.drain()

    # ------------------------------------------------------------ blocks in and out

    def _admit(self, req: Request, num_tokens: int, num_cached: int) -> bool:  # noqa: ARG002
        need = cdiv(num_tokens, self.block_size)
        if need > self.num_free_blocks:
            return False
        self._tables[req] = self._take(need)
        req.num_slots = need * self.block_size
        return True

    def _take(self, num_blocks: int) -> list[int]:
        """Take blocks that `num_free_blocks` covers."""
        return self._pool.take(num_blocks)

    def _release(self, blocks: Iterable[int]) -> list[int]:
        """Drop one reference to each block; returns those that nobody refers to any more."""
        if not self._extra_refs:
            return [block for block in blocks if block != NULL_BLOCK]
        gone = []
        for block in blocks:
            extra = self._extra_refs.get(block)
            if extra is not None:
                self._num_extra_refs -= 1
                if extra == 1:
                    del self._extra_refs[block]
                else:
                    self._extra_refs[block] = extra - 1
            elif block != NULL_BLOCK:
                gone.append(block)
        return gone

    def _discard(self, blocks: list[int]) -> None:
        """Free blocks without references. Those freed last are handed out first."""
        self._pool.give(blocks)

    def _drop(self, req: Request, table: list[int], cancel_copies: bool) -> None:
        """Take a table apart, its last block first."""
        del self._tables[req]
        self._forked.discard(req)
        self._slid.pop(req, None)
        gone = self._release(reversed(table))
        if cancel_copies and self._copies:
            self._copies.cancel(gone)
        self._discard(gone)

    # ------------------------------------------------------------ sharing

    def fork(self, req: Request, child: Request) -> bool:
        """Share the blocks of the prompt less its last token; both copy before they write into a shared block.

        The KV of the shared positions must be computed, or be computed by a step that was planned before the one
        in which `child` is first scheduled. `child` has the same prompt and owns nothing. False when `req` has not
        computed its prompt, holds no full token to share, or has slid past it.
        """
        num_shared = req.num_prompt_tokens - 1
        if not self._can_fork(req) or not self._share_table(req, child, num_shared):
            return False
        child.num_computed_tokens = num_shared
        # Below the last full shared block nobody writes; from there on, `allocate` is asked and copies.
        child.num_slots = num_shared // self.block_size * self.block_size
        if num_shared % self.block_size:
            req.num_slots = min(req.num_slots, child.num_slots)
            self._forked |= {req, child}
        return True

    def _can_fork(self, req: Request) -> bool:
        """Whether `req` holds the KV of its prompt less the last token, for a child to share."""
        num_shared = req.num_prompt_tokens - 1
        if req not in self._tables or num_shared < 1 or req.num_computed_tokens < num_shared:
            return False
        return self._slid.get(req, 0) <= self._num_slid_at(num_shared)

    def _share_table(self, req: Request, child: Request, num_tokens: int) -> bool:
        """Give `child` a table over the blocks of `req`'s first `num_tokens` tokens. False: no room to."""
        self._tables[child] = shared = self._tables[req][: cdiv(num_tokens, self.block_size)]
        num_slid = self._slid.get(req, 0)
        if num_slid:
            self._slid[child] = num_slid
        self._share(shared[num_slid:])
        return True

    def _share(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each block."""
        for block in blocks:
            self._extra_refs[block] = self._extra_refs.get(block, 0) + 1
        self._num_extra_refs += len(blocks)

    def _writes_shared(self, req: Request, table: list[int]) -> bool:
        """Whether `req`'s next write goes into a block that is not its own."""
        if req not in self._forked:
            return False
        index = req.num_computed_tokens // self.block_size
        if index < len(table) and self._is_shared(table[index]):
            return True
        self._forked.discard(req)
        return False

    def _is_shared(self, block: int) -> bool:
        return block in self._extra_refs

    def _copy_on_write(self, req: Request, table: list[int]) -> None:
        index = req.num_computed_tokens // self.block_size
        shared = table[index]
        # Taken before the reference is dropped: the copy must not land in the block that it reads.
        table[index : index + 1] = self._take(1)
        self._copies.order(CopyKind.DEVICE, [shared], [table[index]])
        self._discard(self._release([shared]))
        self._forked.discard(req)

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
            self._discard(self._release(slid))

    # ------------------------------------------------------------ swap

    def swap_out(self, req: Request) -> bool:
        """Copy the computed blocks to host memory and free all blocks. False: no room there, or nothing computed."""
        table = self._tables.get(req)
        if table is None:
            return False
        num_slid = self._slid.get(req, 0)
        blocks = table[num_slid : cdiv(req.num_computed_tokens, self.block_size)]
        if not blocks or len(blocks) > self._host.num_free:
            return False
        self._copies.order(CopyKind.SWAP_OUT, blocks, self._host.store(req, num_slid, len(blocks)))
        self._drop(req, table, cancel_copies=False)
        req.num_slots = 0
        return True

    def swap_in(self, req: Request) -> bool:
        """Copy a swapped request's blocks back into blocks of its own. False: no room, nothing changed."""
        swapped = self._host.lookup(req)
        if swapped is None or len(swapped.host_blocks) > self.num_free_blocks:
            return False
        blocks = self._take(len(swapped.host_blocks))
        self._copies.order(CopyKind.SWAP_IN, swapped.host_blocks, blocks)
        self._host.release(req)
        self._tables[req] = table = [NULL_BLOCK] * swapped.num_slid + blocks
        if swapped.num_slid:
            self._slid[req] = swapped.num_slid
        req.num_slots = len(table) * self.block_size
        return True

    # ------------------------------------------------------------ ledger

    def slots_to_admit(self, head: QueueHead) -> int:
        """Whole blocks, less those that the head brings along (slid out, swapped) or shares (its parent's, hits)."""
        num_blocks = cdiv(head.num_tokens, self.block_size)
        swapped = self._host.lookup(head.req)
        if swapped is not None:
            num_blocks -= swapped.num_slid
        elif head.parent is not None and self._can_fork(head.parent):
            num_blocks -= (head.parent.num_prompt_tokens - 1) // self.block_size
        else:
            num_blocks -= self._num_shared_hits(head.req)
        return num_blocks * self.block_size

    def _num_shared_hits(self, req: Request) -> int:  # noqa: ARG002
        """Blocks that admission would find in a prefix cache and share with running requests."""
        return 0

    def count(self) -> KVUsage:
        """External is 0: any free block serves any request."""
        return self._count(num_cached=0, hits={})

    def _count(self, num_cached: int, hits: dict[Request, int]) -> KVUsage:
        """Raw counts.

        Args:
            num_cached: evictable blocks.
            hits: requests admitted with so many cached tokens; those whose `num_computed_tokens` says so are dropped.
        """
        block_size, num_saved = self.block_size, self._num_extra_refs
        for req in [req for req, hit in hits.items() if req.num_computed_tokens >= hit]:
            del hits[req]
        if self._forked or hits:
            computed = self._count_computed(hits)
        else:
            # Shared blocks are full, so each extra reference counts one block of computed tokens too many.
            computed = sum([req.num_computed_tokens for req in self._tables])
            computed -= (num_saved + sum(self._slid.values())) * block_size
        return KVUsage(
            total=self.num_blocks * block_size,
            computed=computed,
            owned=(self.num_blocks - self._pool.num_free - num_cached) * block_size,
            external=0,
            shortage=0,
            cached=num_cached * block_size,
            free=self._pool.num_free * block_size,
            shared_saved=num_saved * block_size,
        )

    def _count_computed(self, hits: dict[Request, int]) -> int:
        """Distinct computed slots, block by block: while a half-filled block is shared, sums do not tell."""
        filled: dict[int, int] = {}
        for req, table in self._tables.items():
            left = max(req.num_computed_tokens, hits.get(req, 0))
            for block in table:
                if left <= 0:
                    break
                filled[block] = max(filled.get(block, 0), min(left, self.block_size))
                left -= self.block_size
        filled.pop(NULL_BLOCK, None)
        return sum(filled.values())
