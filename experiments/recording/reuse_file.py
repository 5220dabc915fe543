"""reuse.parquet: what prompts asked of the prefix cache, and how long ago that was held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvarena.experiments.caching.accesses import Reuse
from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import REUSE_FILE


def reuse_columns(reuse: Reuse, request_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of reuse.parquet.

    Args:
        reuse: of the run.
        request_ids: of the rows of requests.parquet, the requests of `reuse` among them.
    """
    row_of = {name: row for row, name in enumerate(request_ids)}
    rows = np.array([row_of.get(name, -1) for name in reuse.request_ids], dtype=np.int32)
    size, some = reuse.block_size, reuse.stretches
    in_tokens = {
        "start": "start", "num_tokens": "num_blocks", "num_cached_tokens": "num_found",
        "num_optimal_cached_tokens": "num_optimal",
    }  # fmt: skip
    columns = {name: np.asarray(some[source] * size) for name, source in in_tokens.items()}
    since = np.where(some["num_since"] < 0, np.nan, some["num_since"])
    return {"request": rows[some["row"].astype(np.int64)], **columns, "seconds": some["seconds"], "num_since": since}


def write_reuse(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write reuse.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(REUSE_FILE)
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True, safe=True) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
