"""What beams draw where no model computes: log-probabilities of each beam's best tokens, by chance but always the same.

    p1 ~ Beta(a, b),  p2 : p3 : p4 : ... = 1 : 1/2 : 1/3 : ...,  all of them together 1

Beams differ in a token and mostly go on alike: what follows is then as sure or unsure for one as for the other. So a
share of positions has the same draw for all beams of a search, and at the others each text has its own. And long texts
that a search finds begin to repeat themselves (Holtzman et al., ICLR 2020): from a position on, drawn for each search,
the next token is all but certain, and beams that differ then stay as they are.

Which beams go on is decided by the real search; only the numbers are drawn. Free of torch.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np

from kvarena.engine.errors import ConfigError
from kvarena.engine.model_runner import TokenLogprobs
from kvarena.engine.request import Request

# Of the demo model's beams on the text that it knows: the largest share is 0.56 in the mean, and of what is left the
# next ones have 1, 1/2, 1/3, ... The other numbers are so that as much KV is shared (docs/simulator.md, Beams).
SURE, UNSURE = 0.45, 0.40  # a and b
ALIKE = 0.5  # share of positions at which all beams of a search have the same draw
LEAST_FRESH, MORE_FRESH = 60, 200  # tokens before a text repeats itself: at least, and in the mean beyond that
REPEATED = 0.999  # share of the next token then
_NUM_DRAWS, _NUM_TOKENS = 8192, 256
_SEED = 15


class BeamScores:
    """Draws for beams.

    Args:
        token_ids: tokens that beams may have: none that ends a request.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        first = np.random.default_rng(_SEED).beta(SURE, UNSURE, (_NUM_DRAWS, 1)).clip(1e-6, 1 - 1e-6)
        first = np.concatenate([first, [[REPEATED]]])
        others = 1 / np.arange(1, min(len(token_ids), _NUM_TOKENS))
        shares = np.concatenate([first, (1 - first) * others / others.sum()], axis=1)
        self._logprobs = np.log(-np.sort(-shares, axis=1))
        self._entries = cache(self._made)

    def best(self, req: Request) -> TokenLogprobs:
        """What a beam draws from now.

        Raises:
            ConfigError: it needs more tokens than there are.
        """
        assert req.search is not None
        num, output, name = req.sampling.logprobs or 1, req.output_token_ids, req.search.request_ids[0]
        if num > self._logprobs.shape[1]:
            raise ConfigError(f"beams need {num} tokens a step, and {self._logprobs.shape[1]} are drawn; search fewer")
        if len(output) >= LEAST_FRESH and len(output) >= LEAST_FRESH - MORE_FRESH * math.log(_unit(b"fresh", name)):
            return self._entries(_NUM_DRAWS, num)
        common = zlib.crc32(f"{name} {len(output)}".encode())
        # Another hash of the same: the place in the table must not say whether it is everybody's.
        is_own = zlib.crc32(b"own", common) >= ALIKE * 2**32
        return self._entries((zlib.crc32(array("i", output), common) if is_own else common) % _NUM_DRAWS, num)

    def _made(self, draw: int, num: int) -> TokenLogprobs:
        values = self._logprobs[draw, :num].tolist()
        return TokenLogprobs(self._token_ids[0], values[0], 1, tuple(zip(self._token_ids, values, strict=False)))


def _unit(kind: bytes, name: str) -> float:
    """A number in (0, 1] of that name."""
    return (zlib.crc32(name.encode(), zlib.crc32(kind)) + 1) / 2**32
