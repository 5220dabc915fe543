"""Contiguous regions: reservation (how much) x placement (where). What systems did before paging.

    pool  | A: prompt, output ... reserved ...... | B: ......... | hole | C ............ |
                                  ^ unused until A grows into it  ^ too small for the next request

A region is reserved at admission and never grows: a request that outgrows it gets False, and preemption reserves
anew. `orca_max`, `orca_pow2` and `orca_oracle` of PagedAttention (Kwon et al., SOSP'23, section 6.1) are this class
with buddy placement and blocks of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvarena.allocators.placement import PLACEMENTS
from kvarena.engine.contract import KVAllocator, KVUsage, QueueHead, cdiv, check_choice
from kvarena.engine.request import Request

# Tokens that a request reserves, of at most max_model_len.
RESERVATIONS: dict[str, Callable[[Request, int], int]] = {
    "max": lambda _req, max_model_len: max_model_len,
    # At most twice the true output, as in the paper.
    "pow2": lambda req, _: req.num_prompt_tokens + (1 << max(0, req.expected_output_len - 1).bit_length()),
    "oracle": lambda req, _: req.num_prompt_tokens + req.expected_output_len,
    "prompt": lambda req, _: req.num_tokens,
}


class ContiguousAllocator(KVAllocator):
    """One region of consecutive blocks per request, reserved at admission.

    Args:
        reservation: `max` reserves max_model_len tokens; `pow2` the prompt and the next power of two of the output
            length; `oracle` the prompt and the output length; `prompt` the tokens known now. The output length is
            `oracle_output_len`, or `max_tokens` where the workload does not know it. A reservation is at most
            max_model_len and the largest region of an empty pool, and at least what is asked for.
        placement: `first_fit`, `best_fit` or `buddy` (regions are rounded up to a power of two).
        pool: see KVAllocator.
    """

    contiguous = True
    no_window = "the head of a region cannot be given back while its tail is in use"

    def __init__(self, *, reservation: str = "max", placement: str = "first_fit", **pool: Any) -> None:
        super().__init__(**pool)
        check_choice("allocator.reservation", reservation, RESERVATIONS)
        check_choice("allocator.placement", placement, PLACEMENTS)
        self._reserve = RESERVATIONS[reservation]
        self._placement = PLACEMENTS[placement](self.num_blocks)
        self._regions: dict[Request, range] = {}

    @property
    def max_request_tokens(self) -> int:
        """The largest region of an empty pool."""
        return self._placement.largest * self.block_size

    def reservation_blocks(self, req: Request, num_tokens: int) -> int:
        """Blocks that admitting `req` with `num_tokens` tokens reserves."""
        tokens = min(self._reserve(req, self.max_model_len), self.max_model_len, self.max_request_tokens)
        return cdiv(max(tokens, num_tokens), self.block_size)

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:  # noqa: ARG002
        """Reserve a region at the first call; later calls only answer whether `num_tokens` fit into it."""
        if req in self._regions:
            return num_tokens <= req.num_slots
        num_blocks = self.reservation_blocks(req, num_tokens)
        start = self._placement.take(num_blocks)
        if start is None:
            return False
        self._regions[req] = range(start, start + num_blocks)
        req.num_slots = num_blocks * self.block_size
        return True

    def free(self, req: Request) -> None:
        """Give the region back. Idempotent."""
        req.num_slots = 0
        region = self._regions.pop(req, None)
        if region is not None:
            self._placement.give(region.start, len(region))

    def block_table(self, req: Request) -> Sequence[int]:
        """The region's block ids: a range."""
        return self._regions[req]

    def region_extent(self, num_blocks: int) -> int:
        """What the placement rounds a region up to."""
        return self._placement.extent(num_blocks)

    def slots_to_admit(self, head: QueueHead) -> int:
        """The head's reservation; what a buddy rounds it up by is no need of the request's."""
        return self.reservation_blocks(head.req, head.num_tokens) * self.block_size

    def has_hole(self, head: QueueHead) -> bool:
        """Whether a hole is large enough for the head's region."""
        return self._placement.fits(self.reservation_blocks(head.req, head.num_tokens))

    def count(self) -> KVUsage:
        """Raw counts. External: what buddy regions round up."""
        owned, unused = sum(map(len, self._regions.values())), self._placement.num_free
        return KVUsage(
            total=self.num_blocks * self.block_size,
            computed=sum([req.num_computed_tokens for req in self._regions]),
            owned=owned * self.block_size,
            external=(self.num_blocks - unused - owned) * self.block_size,
            free=unused * self.block_size,
        )
