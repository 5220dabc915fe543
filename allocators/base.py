"""What every allocator shares: its validated size, and the answers of one that cannot share, cache or swap.

The contract is `engine.plan.KVAllocator`. An allocator hands out block ids and never sees a tensor. Its options are
keyword arguments; a value out of range is a ConfigError that names the configuration key.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from engine.errors import ConfigError, NotDefined
from engine.plan import BlockCopy, KVUsage, QueueHead, cdiv
from engine.request import Request

num_computed_of = attrgetter("num_computed_tokens")


def check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer in [low, high]; `name` is the configuration key shown otherwise.

    Raises:
        ConfigError: not an integer, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be an integer")
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name}={value} must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}")
    return value


class BaseAllocator:
    """Base of all allocators.

    Args:
        num_blocks: blocks of the pool, the null block left out; ids are 1..num_blocks.
        block_size: slots per block, 1 to 256.
        max_model_len: most tokens that a request may have.
        kv_bytes_per_token: bytes of one token's KV in every layer; 0 where there are none (tests, simulation).
        sliding_window: positions that a token attends to, itself included; older blocks are given back. None: all.

    Attributes:
        no_window: why this allocator takes no sliding window; None where it does.
        num_virtual_blocks: the largest block id; more than num_blocks only where ids are virtual.
        num_host_blocks: blocks of host memory for swapped requests, ids 0..num_host_blocks - 1.
        commits: whether `commit` does anything; without, nobody need call it.
        reads_tokens: whether token ids decide what a request owns (a prefix cache).

    Raises:
        ConfigError: a value out of range.
        NotDefined: a window is asked of an allocator that cannot give slid-out blocks back.
    """

    contiguous: bool = False
    no_window: str | None = None
    commits: bool = False
    reads_tokens: bool = False

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        kv_bytes_per_token: int = 0,
        sliding_window: int | None = None,
    ) -> None:
        if sliding_window is not None:
            check_int("allocator.sliding_window", sliding_window, 1)
            if self.no_window is not None:
                raise NotDefined(
                    f"allocator.sliding_window={sliding_window} cannot be combined with this allocator: "
                    f"{self.no_window}; use allocator=paged"
                )
        self.sliding_window = sliding_window
        self.block_size = check_int("allocator.block_size", block_size, 1, 256)
        if isinstance(num_blocks, int) and num_blocks < 1:
            raise ConfigError(
                f"a KV pool of {num_blocks} blocks of {block_size} tokens holds nothing; raise kv_cache.num_blocks or "
                "kv_cache.memory_gib, or lower allocator.block_size"
            )
        self.num_blocks = check_int("kv_cache.num_blocks", num_blocks, 1)
        self.max_model_len = check_int("engine.max_model_len", max_model_len, 1)
        self.num_virtual_blocks = num_blocks
        self.num_host_blocks = 0
        self.kv_bytes_per_token = check_int("kv_bytes_per_token", kv_bytes_per_token, 0)

    def match_prefix(self, req: Request) -> int:  # noqa: ARG002
        """No prefix cache: 0."""
        return 0

    def commit(self, req: Request) -> None:
        """Nothing to publish or to drop."""

    def fork(self, req: Request, child: Request) -> bool:  # noqa: ARG002
        """No sharing: False."""
        return False

    def swap_out(self, req: Request) -> bool:  # noqa: ARG002
        """No host space: False."""
        return False

    def swap_in(self, req: Request) -> bool:  # noqa: ARG002
        """No host space: False."""
        return False

    def drain_copies(self) -> list[BlockCopy]:
        """No copies."""
        return []

    def cached_blocks(self) -> Iterable[int]:
        """No prefix cache: no blocks."""
        return ()

    def region_extent(self, num_blocks: int) -> int:
        """Its own blocks and no more."""
        return num_blocks

    def clear_cache(self) -> None:
        """No prefix cache: nothing to forget."""

    # ------------------------------------------------------------ ledger

    def usage(self, head: QueueHead | None = None) -> KVUsage:
        """Raw counts. The one place that says what free slots are to the head of the queue.

        A cached block serves the head too, as a hit or evicted for it: only a need beyond both is a shortage. What a
        policy holds back (a watermark, a full batch) is no property of the slots: they are free.
        """
        usage = self.count()
        if head is None or not usage.free:
            return usage
        if self.slots_to_admit(head) > usage.free + usage.cached:
            return usage._replace(shortage=usage.free, free=0)
        if not self.has_hole(head):
            return usage._replace(external=usage.external + usage.free, free=0)
        return usage

    def count(self) -> KVUsage:
        """Raw counts with nobody in the queue: what no request can ever own is external, the rest is free."""
        raise NotImplementedError

    def slots_to_admit(self, head: QueueHead) -> int:
        """Slots that admitting `head` takes from the free and the cached ones: whole blocks."""
        return cdiv(head.num_tokens, self.block_size) * self.block_size

    def has_hole(self, head: QueueHead) -> bool:  # noqa: ARG002
        """Whether enough slots lie as `head` needs them. Here any free block serves anyone."""
        return True
