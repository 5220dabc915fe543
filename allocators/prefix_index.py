"""What a prefix cache asks of an index: which tokens a block holds. Which cached block goes first, its order says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvarena.allocators.eviction_order import EvictionOrder
from kvarena.engine.request import Request


class Hit(NamedTuple):
    """Published blocks with a request's first tokens, and which of them requests own (`in_use`).

    `node` is the place at which the last of them lies.
    """

    node: Any
    blocks: list[int]
    in_use: Sequence[int]


class PrefixIndex(ABC):
    """Full blocks by their tokens. Who refers to a block is the allocator's business, and it tells: `enter`, `leave`.

    A node is a place in the index, of whatever type: each live request stands at one, and owns all blocks on the way to
    it. Requests share no block that is not published. So a block that nobody owns has nothing behind it that somebody
    does, and each such block can be evicted, the last of its chain first.

    Args:
        block_size: tokens of a block.
        order: of the evictable blocks; it is told what is published, found, taken and released.

    Attributes:
        root: the node of the empty prefix.
        order: see above.
    """

    root: Any

    def __init__(self, block_size: int, order: EvictionOrder) -> None:
        self._block_size = block_size
        self.order = order
        self._recalls = order.policy.recalls

    @property
    def num_evictable(self) -> int:
        """Published blocks that no request owns."""
        return self.order.num_evictable

    @abstractmethod
    def __contains__(self, block: int) -> bool:
        """Whether `block` is published."""

    @abstractmethod
    def match(self, req: Request, num_blocks: int) -> int:
        """How many of `req`'s first `num_blocks` blocks are published. Changes no answer."""

    @abstractmethod
    def num_in_use(self, req: Request, num_blocks: int) -> int:
        """How many of these requests own. Changes no answer."""

    @abstractmethod
    def find(self, req: Request, num_blocks: int) -> Hit:
        """The published ones among `req`'s first `num_blocks` blocks."""

    @abstractmethod
    def forget(self, req: Request) -> None:
        """`req` owns nothing any more, and may have other tokens when it comes back (a beam)."""

    @abstractmethod
    def enter(self, node: Any, req: Request, *, found: bool) -> None:
        """`req` stands at `node` and owns what is on the way to it: what `find` found, or another request's blocks."""

    @abstractmethod
    def leave(self, node: Any) -> None:
        """A request stands at `node` no more. Comes after `keep` of what nobody owns without it."""

    @abstractmethod
    def above(self, node: Any, depth: int, num_blocks: int) -> Any:
        """The node of the first `num_blocks` <= `depth` blocks on the way to `node`, which lies `depth` blocks deep."""

    @abstractmethod
    def publish(
        self, node: Any, req: Request, table: list[int], start: int, stop: int
    ) -> tuple[Any, list[int], list[int]]:
        """Publish `req`'s full blocks [start, stop), below `node`, where it stands.

        May put an equal block that is published already in an entry's place.

        Returns:
            The node where `req` stands now, the blocks that left its table, and those that came and have other owners.
        """

    @abstractmethod
    def keep(self, blocks: Iterable[int]) -> list[int]:
        """Take in those of `blocks`, which nobody owns any more, that are published; returns the others, in order."""

    @abstractmethod
    def evict(self, num_blocks: int) -> list[int]:
        """Forget `num_blocks` <= num_evictable blocks, in the order's order, and return them."""

    @abstractmethod
    def evictable_blocks(self) -> Iterable[int]:
        """All published blocks that no request owns."""
