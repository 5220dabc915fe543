"""One random stream per request, without generator state.

A stream is keyed by a 64-bit seed; the draw at output position `p` depends on (seed, p) and nothing else: not on the
batch, the row or the step. Each draw gives one exponential variate per vocabulary entry, for the exponential race

    argmax_i  logits_i / T  -  log E_i,     E_i ~ Exp(1) independent

which picks token i with probability softmax(logits / T)_i (the Gumbel-max trick; Gumbel, 1954). A race needs no
normalisation and no cumulative sum, so its outcome has no rounding that depends on the batch's shape.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN64 = np.uint64(0x9E3779B97F4A7C15)
# Signed views of 32-bit constants: torch has no uint32 arithmetic, and int32 products wrap the same way.
_GOLDEN32 = 0x9E3779B9 - (1 << 32)
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - (1 << 32)
# The largest float32 below 1: keeps E finite.
_BELOW_ONE = 1.0 - 2.0**-24


def derive_seed(engine_seed: int, request_id: str) -> int:
    """The 64-bit seed of a request that brought none: a hash of the engine's seed and the request's id."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def as_seed64(seed: int) -> int:
    """Any Python integer as an unsigned 64-bit seed; a larger one is hashed, so that none of its digits is lost."""
    if not -(1 << 63) <= seed <= _MASK64:
        return derive_seed(0, f"seed {seed}")
    return seed & _MASK64


def stream_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The key of each row's draw: splitmix64 (Steele, Lea and Flood, 2014) of (seed, position).

    Args:
        seeds: uint64 [N].
        positions: [N], the output position that each row samples, from 0.

    Returns:
        int32 [N, 2]: the key's low and high half.
    """
    # The seed is mixed before the position is added, so that neighbouring seeds are not shifted copies of a stream.
    mixed = _splitmix64(_splitmix64(seeds.astype(np.uint64)) + positions.astype(np.uint64) * _GOLDEN64)
    return mixed.astype("<u8").view("<i4").reshape(-1, 2)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def log_exponentials(keys: Tensor, vocab_size: int, first: int = 0) -> Tensor:
    """log E for every row and token.

    Args:
        keys: int32 [N, 2] of `stream_keys`.
        vocab_size: number of tokens V.
        first: the first of them.

    Returns:
        float32 [N, V].
    """
    tokens = torch.arange(first, first + vocab_size, dtype=torch.int32, device=keys.device) * _GOLDEN32
    bits = _mix32(tokens + keys[:, :1])
    bits = _mix32(bits ^ keys[:, 1:])
    # 31 bits, so that the conversion to float keeps the relative precision of small values: the winners of the race.
    uniform = (bits & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_()


def _mix32(x: Tensor) -> Tensor:
    """A full-avalanche 32-bit hash, in place (Wellons' "lowbias32"); shifts are made logical by a mask."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLY_1
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLY_2
    x ^= (x >> 16) & 0xFFFF
    return x
