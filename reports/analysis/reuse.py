"""Hits by reuse distance: how long ago what a prompt asks for was held, in seconds and in blocks held since.

    stretch of a prompt    |XXXXXXXXXXXX|----|    4 blocks of 3 bins: each block stands one further than the one before
    blocks held since       9  10  11  12

A block behind n others is found by an LRU cache of more than n blocks beside what runs: the share of what is asked for
up to some distance is what such a cache would find.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.reports.analysis.prefix_cache import share_of
from kvarena.reports.drawing.document import Table
from kvarena.reports.drawing.format import count, percent
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.files import RunFiles, read_table
from kvarena.reports.reading.names import REUSE_FILE

SECONDS = ((1.0, "1 s"), (10.0, "10 s"), (60.0, "1 min"), (600.0, "10 min"), (3600.0, "1 h"))
POOLS = ((0.125, "1/8"), (0.25, "1/4"), (0.5, "1/2"), (1.0, "1"), (2.0, "2"), (4.0, "4"), (8.0, "8"))
IN_USE, LONGER, NEVER = "in use", "longer ago", "never before"
COUNTS = ("num_tokens", "num_cached_tokens", "num_optimal_cached_tokens")
MOST_REPLICAS = 8

Columns = dict[str, np.ndarray]


def summarize_reuse(run: RunFiles) -> dict[str, Any] | None:
    """Tokens asked for, found and to be found by distance; None where nobody recorded it.

    Returns:
        `by_seconds` and `by_blocks`, rows from near to far with `label` and `up_to` (seconds; blocks; null: any), and
        of a run on several replicas `replicas`, rows by blocks of each.
    """
    path, pool = run.path / REUSE_FILE, run.manifest["pool"]
    if run.is_unrecorded or not path.exists():
        return None
    table = read_table(path, names_of(REUSE_FILE))
    # Null is NaN here.
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    columns["num_since"] = columns["num_since"].astype(float)
    size, num_blocks = int(pool["block_size"]), int(pool["num_blocks"])
    limits = [int(num_blocks * share) for share, _ in POOLS]
    names = [f"{name} of the pool" if "/" in name else f"{name} pool{'s' * (name != '1')}" for _, name in POOLS]
    result: dict[str, Any] = {
        "by_seconds": _by_seconds(columns),
        "by_blocks": _by_blocks(columns, size, limits, names),
    }
    if run.num_replicas > 1:
        replica = run.requests["replica"][columns["request"]]
        result["replicas"] = [
            _by_blocks({name: column[replica == number] for name, column in columns.items()}, size, limits, names)
            for number in range(run.num_replicas)
        ]
    return result


def _by_seconds(columns: Columns) -> list[dict[str, Any]]:
    seconds = columns["seconds"]
    known, free = ~np.isnan(seconds), ~np.isnan(columns["num_since"])
    limits = [limit for limit, _ in SECONDS]
    places = np.where(known, np.where(free, 1 + np.searchsorted(limits, seconds), 0), len(limits) + 2)
    labels = [IN_USE, *(f"up to {name}" for _, name in SECONDS), LONGER, NEVER]
    sums = [[int(columns[name][places == place].sum()) for name in COUNTS] for place in range(len(labels))]
    return _rows(labels, [0.0, *limits, None, None], sums)


def _by_blocks(columns: Columns, size: int, limits: list[int], names: list[str]) -> list[dict[str, Any]]:
    since = columns["num_since"]
    known, free = ~np.isnan(columns["seconds"]), ~np.isnan(since)
    labels = [IN_USE, *(f"up to {name} ({count(limit)})" for name, limit in zip(names, limits, strict=True)), LONGER]
    sums = np.zeros((len(labels) + 1, len(COUNTS)), dtype=np.int64)
    for index, name in enumerate(COUNTS):
        tokens = columns[name]
        sums[0, index] = tokens[known & ~free].sum()
        sums[-1, index] = tokens[~known].sum()
        # Of a stretch the first blocks are found, and stand nearest. One behind n others takes a place of n + 1.
        begin, length = since[free], tokens[free] // size
        below = [int(np.clip(limit - begin, 0, length).sum()) * size for limit in limits]
        sums[1:-1, index] = np.diff([0, *below, int(tokens[free].sum())])
    return _rows([*labels, NEVER], [0, *limits, None, None], sums.tolist())


def _rows(labels: list[str], limits: list[Any], sums: list[list[int]]) -> list[dict[str, Any]]:
    return [
        {"label": label, "up_to": limit, **dict(zip(COUNTS, counts, strict=True))}
        for label, limit, counts in zip(labels, limits, sums, strict=True)
    ]


def reuse_tables(summary: dict[str, Any]) -> list[Table]:
    """Hits by distance, without the distances at which nothing was asked for; nothing where nobody recorded them."""
    reuse = summary["reuse"]
    if reuse is None:
        return []
    tables = [
        _table(reuse["by_seconds"], "Hits by how long ago a request held the blocks last"),
        _table(reuse["by_blocks"], "Hits by how many different blocks were held since, in pools"),
    ]
    replicas = reuse.get("replicas", [])
    if replicas and len(replicas) <= MOST_REPLICAS:
        asked = [any(one[i]["num_tokens"] for one in replicas) for i in range(len(replicas[0]))]
        rows = [
            [row["label"], *(percent(share_of(one[i]["num_cached_tokens"], one[i]["num_tokens"])) for one in replicas)]
            for i, row in enumerate(replicas[0]) if asked[i]
        ]  # fmt: skip
        header = ["blocks held since", *(f"replica {number}" for number in range(len(replicas)))]
        tables.append(Table(header, rows, "Hit rate of what each replica was asked for, by blocks held in it since"))
    return tables


def _table(rows: list[dict[str, Any]], caption: str) -> Table:
    total = sum(row["num_tokens"] for row in rows)
    header = ["last held", "tokens asked for", "share", "found", "hit rate", "at most"]
    cells = [
        [row["label"], count(row["num_tokens"]), percent(share_of(row["num_tokens"], total)),
         count(row["num_cached_tokens"]), percent(share_of(row["num_cached_tokens"], row["num_tokens"])),
         percent(share_of(row["num_optimal_cached_tokens"], row["num_tokens"]))]
        for row in rows if row["num_tokens"]
    ]  # fmt: skip
    return Table(header, cells, caption)
