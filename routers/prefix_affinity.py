"""Requests follow their prefix, by what the router itself remembers of where it sent which prompt.

The rule of SGLang's cache-aware router (sgl-model-gateway, policies/cache_aware.rs): while the load is even, the
replica that was sent the longest prefix of the prompt, if that is long enough, else the one that knows the least; while
it is uneven, the one with the fewest open requests. Nothing is asked of the replicas but how many requests are open, so
what they have evicted, or never computed, is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvarena.engine.contract import check_int, is_number, require
from kvarena.engine.request import Request
from kvarena.engine.routing import ReplicaState, Router


class PrefixAffinityRouter(Router):
    """Follows prefixes as long as the load is even.

    Args:
        match: share of the prompt, in [0, 1], that a replica must have been sent before for the request to follow it.
        balance_abs: the load is uneven where the most and the fewest open requests of a replica differ by more, and
        balance_rel: where the most are more than so many times the fewest.
        block_size: tokens of a block, by which prompts are compared.
        max_blocks: blocks that the router remembers over all replicas; the least recently sent ones are forgotten.
        num_replicas: see `Router`.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        *,
        num_replicas: int,
        match: float = 0.5,
        balance_abs: int = 32,
        balance_rel: float = 1.5,
        block_size: int = 128,
        max_blocks: int = 1_000_000,
    ) -> None:
        super().__init__(num_replicas=num_replicas)
        require(is_number(match) and 0 <= match <= 1, "router.match", match, "in [0, 1]")
        require(is_number(balance_rel) and balance_rel >= 1, "router.balance_rel", balance_rel, "at least 1")
        self._match = match
        self._balance_abs = check_int("router.balance_abs", balance_abs, 0)
        self._balance_rel = balance_rel
        self._block_size = check_int("router.block_size", block_size, 1)
        self._max_blocks = check_int("router.max_blocks", max_blocks, 1)
        self._sent: OrderedDict[tuple[int, int], None] = OrderedDict()  # (replica, prefix), least recently sent first
        self._num_known = [0] * num_replicas

    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:
        loads = [state.num_open for state in replicas]
        prefixes = list(self._prefixes(req))
        fewest, most = min(loads), max(loads)
        if most - fewest > self._balance_abs and most > self._balance_rel * fewest:
            chosen = loads.index(fewest)
        else:
            known = [self._known(number, prefixes) for number in range(len(replicas))]
            longest = max(known)
            if longest * self._block_size >= self._match * req.num_prompt_tokens and longest:
                chosen = min((n for n, count in enumerate(known) if count == longest), key=loads.__getitem__)
            else:
                chosen = min(range(len(replicas)), key=lambda number: (self._num_known[number], loads[number]))
        self._remember(chosen, prefixes)
        return chosen

    def _prefixes(self, req: Request) -> Iterator[int]:
        """An identity of each whole block of the prompt with all that is before it."""
        tokens, size = req.prompt_identities, self._block_size
        prefix = hash(req.cache_salt)
        for end in range(size, req.num_prompt_tokens + 1, size):
            prefix = hash((prefix, *tokens[end - size : end]))
            yield prefix

    def _known(self, replica: int, prefixes: Sequence[int]) -> int:
        """Leading blocks that `replica` was sent before. A block is forgotten before the one in front of it."""
        low, high = 0, len(prefixes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (replica, prefixes[middle - 1]) in self._sent else (low, middle - 1)
        return low

    def _remember(self, replica: int, prefixes: Sequence[int]) -> None:
        """`replica` was sent these, the last block least recently, so that it is forgotten first."""
        for prefix in reversed(prefixes):
            key = (replica, prefix)
            self._num_known[replica] += key not in self._sent
            self._sent[key] = None
            self._sent.move_to_end(key)
        while len(self._sent) > self._max_blocks:
            (gone, _), _ = self._sent.popitem(last=False)
            self._num_known[gone] -= 1
