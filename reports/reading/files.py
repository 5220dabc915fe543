"""Reads what a run left behind (docs/files.md), strictly: a report must not be drawn from half a file.

Wide columns (token ids, token times) are read one by one and only when asked for, so that a run of a million
requests fits in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvarena.engine.classes import CLASSES
from kvarena.reports.reading.columns import names_of, schema_of
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE, ROUTING_FILE, STEPS_FILE
from kvarena.reports.reading.shapes import MANIFEST, TOTALS, mismatch

LIST_COLUMNS = ("prompt_token_ids", "output_token_ids", "token_times")
LATER_REQUEST_COLUMNS = (
    "last_token_time",
    "num_first_tokens",
    "num_loaded_tokens",
    "num_optimal_cached_tokens",
    "kind",
)  # older run folders lack them
REQUEST_COLUMNS = names_of(REQUESTS_FILE, without=(*LIST_COLUMNS, *LATER_REQUEST_COLUMNS, "priority"))
# What a step-time profile is fitted to is no report's.
FEATURES = ("num_prefill_requests", "longest_prefill", "num_attention_pairs")
STEP_COLUMNS = names_of(STEPS_FILE, without=("launched_time", "decision_hash", *FEATURES))
# Columns that older run folders lack; there they are 0.
ADDED_LATER = ("shortage", "num_experts_read", "replica", "num_kv_tokens", "num_distinct_kv_tokens")
ROWS_AT_ONCE = 8192
NO_LISTS = pa.array([], pa.large_list(pa.float64()))
UNRECORDED = "none"  # manifest.json's run.recorded of a run that left no Parquet files
REMEDY = "run the job again, or point at a run folder that is whole"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What one run left.

    Attributes:
        path: the run folder.
        manifest: manifest.json.
        requests: the scalar columns of requests.parquet, one array each; null times are NaN. Those of
            LATER_REQUEST_COLUMNS may be absent. Of a run behind a router also `replica`.
        steps: the columns of steps.parquet, one array each.
    """

    path: Path
    manifest: dict[str, Any]
    requests: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]

    @property
    def num_requests(self) -> int:
        """Rows of requests.parquet."""
        return len(self.requests["request_id"])

    @property
    def num_steps(self) -> int:
        """Rows of steps.parquet."""
        return len(self.steps["step"])

    @property
    def num_replicas(self) -> int:
        """Replicas that ran it: 1 without a router."""
        return int(self.manifest.get("replicas") or 1)

    @property
    def is_unrecorded(self) -> bool:
        """Whether nothing was recorded but totals (`driver.record=none`): there are no rows then."""
        return self.manifest["run"].get("recorded") == UNRECORDED

    @property
    def finished(self) -> np.ndarray:
        """Bool per request: it ended by itself (`stop` or `length`)."""
        return np.isin(self.requests["finish_reason"], ("stop", "length"))

    def lists(self, column: str, rows: np.ndarray | None = None) -> pa.LargeListArray:
        """One of the list columns. Read anew on each call.

        Args:
            column: its name.
            rows: the requests that are wanted, in that order; None takes all. The file is then read piece by piece, so
                memory holds what is wanted and no more.
        """
        pieces, start = [NO_LISTS] if self.is_unrecorded else [], 0
        order = np.arange(self.num_requests) if rows is None else np.argsort(rows, kind="stable")
        wanted = order if rows is None else rows[order]
        for batch in self._batches(column):
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(batch))] - start
            pieces.append(batch.take(pa.array(inside)))
            start += len(batch)
        return pa.concat_arrays(pieces).take(pa.array(np.argsort(order, kind="stable")))

    def list_lengths(self, column: str) -> np.ndarray:
        """Entries of each list of one of the list columns; null lists have none. Read piece by piece."""
        pieces = [batch.value_lengths().to_numpy() for batch in self._batches(column)]
        return np.concatenate([np.empty(0, dtype=np.int64), *pieces])

    def digest(self, column: str) -> bytes:
        """A hash of one of the list columns, read piece by piece: compares runs without holding them."""
        lengths, values = blake2b(), blake2b()
        for batch in self._batches(column):
            lengths.update(batch.value_lengths().to_numpy().tobytes())
            values.update(flat(batch).tobytes())
        return lengths.digest() + values.digest()

    def _batches(self, column: str) -> Iterator[pa.LargeListArray]:
        """One of the list columns, a few thousand rows at a time; at least one batch but where nothing was recorded."""
        if self.is_unrecorded:
            return
        path = self.path / REQUESTS_FILE
        with _opened(path, (column,)) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                yield as_lists(batch.column(0), path, column)
            yield as_lists(file.schema_arrow.empty_table().column(column), path, column)


def as_lists(column: pa.ChunkedArray | pa.Array, path: Path, name: str) -> pa.LargeListArray:
    """A list column of a Parquet file; null lists are empty."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise ReportError(f"{path}: column {name!r} holds {array.type}, not lists; {REMEDY}")
    lists = array.cast(pa.large_list(array.type.value_type))
    if not lists.null_count:
        return lists
    import pyarrow.compute as pc  # late: few files have any

    return pc.coalesce(lists, pa.scalar([], lists.type))


def flat(lists: pa.LargeListArray) -> np.ndarray:
    """The entries of all lists, end to end."""
    return lists.flatten().to_numpy(zero_copy_only=False)


def read_json(path: Path, shape: Any = None, remedy: str = REMEDY) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        shape: what it must hold (reports/reading/shapes.py); None: anything.
        remedy: what to do about a file that is none.

    Raises:
        ReportError: it is missing, broken, of another shape, or holds a number that is not finite.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise ReportError(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)}); {remedy}") from None
    wrong = None if shape is None else mismatch(value, shape)
    if wrong is not None:
        raise ReportError(f"{path}: {wrong} (docs/files.md); {remedy}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def one_line(error: Exception) -> str:
    """First line of an error's text, without the full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextmanager
def _opened(path: Path, columns: Iterable[str]) -> Iterator[pq.ParquetFile]:
    """A Parquet file; if it is missing or broken, also while it is read, or lacks a column, that is a ReportError."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise ReportError(f"{path} lacks column(s) {', '.join(missing)} (docs/files.md lists them); {REMEDY}")
            yield file
    except FileNotFoundError:
        raise ReportError(f"{path} is missing; {REMEDY}") from None
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)}); {REMEDY}") from None


def read_table(path: Path, columns: tuple[str, ...], later: tuple[str, ...] = ()) -> pa.Table:
    """Those columns of a Parquet file, and of those that older run folders lack the ones that are there.

    A column of ADDED_LATER is 0 in each row where it is not there. Raises ReportError: a file or column is missing, or
    the file is broken.
    """
    with _opened(path, (name for name in columns if name not in ADDED_LATER)) as file:
        names = file.schema_arrow.names
        table = file.read(columns=[name for name in (*columns, *later) if name in names])
    for name in columns:
        if name not in names:
            table = table.append_column(name, pa.array(np.zeros(table.num_rows, dtype=np.int64)))
    return table


def has_columns(path: Path, columns: Iterable[str]) -> bool:
    """Whether a Parquet file, which is there, has all of these columns."""
    with _opened(path, ()) as file:
        return set(columns) <= set(file.schema_arrow.names)


def _arrays(path: Path, table: pa.Table) -> dict[str, np.ndarray]:
    arrays = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            arrays[name] = np.array(["" if value is None else value for value in column.to_pylist()], dtype=object)
        elif pa.types.is_integer(column.type) and column.null_count:
            raise ReportError(f"{path}: column {name!r} has {column.null_count} empty cell(s); {REMEDY}")
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            arrays[name] = column.to_numpy()
        elif pa.types.is_null(column.type):  # a column of nothing but nulls, such as the times of rejected requests
            arrays[name] = np.full(len(column), np.nan)
        else:
            raise ReportError(f"{path}: column {name!r} holds {column.type}, not numbers or text; {REMEDY}")
    return arrays


def _check_ledger(path: Path, steps: dict[str, np.ndarray]) -> None:
    """The classes add up to the pool in every step, or the report would draw a picture of nothing."""
    wrong = np.flatnonzero(sum(steps[name] for name in CLASSES) != steps["total"])
    if len(wrong):
        step = int(wrong[0])
        parts = " + ".join(f"{name} {steps[name][step]}" for name in CLASSES)
        raise ReportError(
            f"{path}: the KV ledger of step {step} does not add up: {parts} is not total {steps['total'][step]} "
            f"({len(wrong)} such step(s)); the run's accounting is broken, {REMEDY}"
        )


def read_run(run_dir: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ReportError: a file is missing or broken, lacks a column or key, or its KV ledger does not add up.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is not a folder; give the folder of a run")
    manifest = read_json(run_dir / MANIFEST_FILE, MANIFEST)
    if manifest["run"].get("recorded") == UNRECORDED:
        wrong = mismatch(manifest["run"].get("totals"), TOTALS, "run.totals")
        if wrong is not None:
            raise ReportError(f"{run_dir / 'manifest.json'}: {wrong} (docs/files.md); {REMEDY}")
        tables = [schema_of(name).empty_table() for name in (REQUESTS_FILE, STEPS_FILE)]
        requests, steps = tables[0].select(list(REQUEST_COLUMNS)), tables[1].select(list(STEP_COLUMNS))
    else:
        requests = read_table(run_dir / REQUESTS_FILE, REQUEST_COLUMNS, LATER_REQUEST_COLUMNS)
        steps = read_table(run_dir / STEPS_FILE, STEP_COLUMNS)
    files = RunFiles(
        run_dir, manifest, _arrays(run_dir / REQUESTS_FILE, requests), _arrays(run_dir / STEPS_FILE, steps)
    )
    _check_ledger(run_dir / STEPS_FILE, files.steps)
    if manifest.get("replicas") and not files.is_unrecorded:
        files.requests["replica"] = _replicas_of(files)
    return files


def _replicas_of(files: RunFiles) -> np.ndarray:
    """The replica of each request, from routing.parquet."""
    path = files.path / ROUTING_FILE
    replica = _arrays(path, read_table(path, ("replica",)))["replica"]
    if len(replica) != files.num_requests or not np.isin(replica, np.arange(files.num_replicas)).all():
        raise ReportError(
            f"{path} has {len(replica)} rows for {files.num_requests} requests, or names a replica beyond the "
            f"{files.num_replicas} of the run; {REMEDY}"
        )
    return replica
