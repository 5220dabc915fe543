"""Names of full blocks: digests of all that their bytes depend on.

    root = digest of the cache salt       name(i) = digest of name(i - 1) and the tokens of block i

Equal names mean equal KV, whoever computed it. Each part is framed by its length, so no two lists of parts are alike.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

_TOKENS, _IDENTITIES, _SALT = b"t", b"i", b"s"


class BlockName(NamedTuple):
    """A full block by what it holds.

    Attributes:
        digest: of its tokens and of all before them, 32 bytes.
        before: the digest of the block before it, or the root.
        depth: blocks before it.
    """

    digest: bytes
    before: bytes
    depth: int

    @property
    def number(self) -> int:
        """64 bits of the digest, for counts and never for content."""
        return int.from_bytes(self.digest[:8], "little")


def root_digest(cache_salt: str) -> bytes:
    """The digest of the empty prefix under a cache salt."""
    return sha256(_SALT + _framed(cache_salt.encode())).digest()


def block_name(before: bytes, depth: int, identities: Sequence[int]) -> BlockName:
    """The name of the block behind `before` that holds `identities` (`Request.identities`)."""
    try:
        parts = _TOKENS + _framed(array("q", identities).tobytes())
    except OverflowError:  # an image's identity is a digest itself
        numbers = [number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True) for number in identities]
        parts = _IDENTITIES + b"".join(map(_framed, numbers))
    return BlockName(sha256(before + parts).digest(), before, depth)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part
