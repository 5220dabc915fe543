"""What prompts share, without what is in them: a hash for each block and all that stands before it.

    hash[i] = BLAKE2b-64(key; hash[i - 1], what stands at the positions of block i)

The key is drawn by the server and kept nowhere, so that nobody can try out which text a hash may be of. Equal hashes of
one recording mean equal beginnings. A request's prompt and output are hashed as one sequence: the next turn's prompt
begins with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import PREFIXES_FILE

KEY_BYTES = 16


def block_hashes(key: bytes, sequence: np.ndarray | Sequence[int], block_size: int, salt: str = "") -> np.ndarray:
    """Hashes of a sequence's blocks, the last one perhaps partial.

    Args:
        key: of the recording.
        sequence: tokens (int32), or positions' identities, of which images' are larger.
        block_size: positions of a block.
        salt: requests of different salts share nothing.

    Returns:
        int64 [ceil(len(sequence) / block_size)].
    """
    before = blake2b(salt.encode(), digest_size=8, key=key).digest()
    hashes = np.empty(-(-len(sequence) // block_size), dtype=np.int64)
    for index in range(len(hashes)):
        block = sequence[index * block_size : (index + 1) * block_size]
        content = block.tobytes() if isinstance(block, np.ndarray) else repr(list(block)).encode()
        before = blake2b(before + content, digest_size=8, key=key).digest()
        hashes[index] = int.from_bytes(before, "little", signed=True)
    return hashes


def write_prefixes(path: Path, request_ids: Sequence[str], block_size: int, hashes: Sequence[np.ndarray]) -> None:
    """Write prefixes.parquet: a row a request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [block_size] * len(hashes)
    columns = {"request_id": list(request_ids), "block_size": sizes, "block_hashes": list(hashes)}
    pq.write_table(pa.table(columns, schema_of(PREFIXES_FILE)), path)


def hidden_name(key: bytes, name: str) -> str:
    """A client's name as a hash; empty stays empty."""
    return f"client-{blake2b(name.encode(), digest_size=6, key=key).hexdigest()}" if name else ""
