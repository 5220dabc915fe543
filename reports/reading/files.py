"""Reads what a run left behind (docs/files.md), strictly: a report must not be drawn from half a file.

Wide columns (token ids, token times) are read one by one and only when asked for, so that a run of a million
requests fits in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvarena.engine.classes import CLASSES
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE
from kvarena.reports.reading.shapes import MANIFEST, TOTALS, mismatch

LIST_COLUMNS = ("prompt_token_ids", "output_token_ids", "token_times")
LATER_REQUEST_COLUMNS = ("last_token_time", "num_first_tokens")  # older run folders lack them
REQUEST_COLUMNS = names_of(REQUESTS_FILE, without=(*LIST_COLUMNS, *LATER_REQUEST_COLUMNS, "priority"))
# What a step-time profile is fitted to is no report's.
FEATURES = ("num_prefill_requests", "longest_prefill", "num_kv_tokens", "num_attention_pairs")
STEP_COLUMNS = names_of(STEPS_FILE, without=("launched_time", "decision_hash", *FEATURES))
ADDED_LATER = ("shortage",)  # columns that older run folders lack; there they are 0
ROWS_AT_ONCE = 8192
TEXT_COLUMNS = ("request_id", "client_id", "finish_reason", "error")
UNRECORDED = "none"  # manifest.json's run.recorded of a run that left no Parquet files
REMEDY = "run the job again, or point at a run folder that is whole"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What one run left.

    Attributes:
        path: the run folder.
        manifest: manifest.json.
        requests: the scalar columns of requests.parquet, one array each; null times are NaN. Those of
            LATER_REQUEST_COLUMNS may be absent.
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
    def is_unrecorded(self) -> bool:
        """Whether nothing was recorded but totals (`driver.record=none`): there are no rows then."""
        return self.manifest["run"].get("recorded") == UNRECORDED

    @property
    def finished(self) -> np.ndarray:
        """Bool per request: it ended by itself (`stop` or `length`)."""
        return np.isin(self.requests["finish_reason"], ("stop", "length"))

    def lists(self, column: str, rows: np.ndarray | None = None) -> Ragged:
        """One of the list columns, flat. Read anew on each call.

        Args:
            column: its name.
            rows: the requests that are wanted, in that order; None takes all. The file is then read piece by piece, so
                memory holds what is wanted and no more.
        """
        if self.is_unrecorded:
            return Ragged.concatenate([])
        path = self.path / REQUESTS_FILE
        if rows is None:
            return Ragged.of(read_table(path, (column,)).column(column), path, column)
        wanted = np.sort(rows)
        pieces, start = [], 0
        for batch in _batches(path, column):
            stop = start + len(batch)
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
            pieces.append(Ragged.of(batch, path, column).take(inside - start))
            start = stop
        return Ragged.concatenate(pieces).take(np.argsort(np.argsort(rows, kind="stable"), kind="stable"))

    def list_lengths(self, column: str) -> np.ndarray:
        """Entries of each list of one of the list columns; null lists have none. Read piece by piece."""
        if self.is_unrecorded:
            return np.empty(0, dtype=np.int64)
        path = self.path / REQUESTS_FILE
        pieces = [np.diff(Ragged.of(batch, path, column).offsets) for batch in _batches(path, column)]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def digest(self, column: str) -> bytes:
        """A hash of one of the list columns, read piece by piece: compares runs without holding them."""
        path = self.path / REQUESTS_FILE
        lengths, values = blake2b(), blake2b()
        for batch in _batches(path, column):
            lists = Ragged.of(batch, path, column)
            lengths.update(np.diff(lists.offsets).tobytes())
            values.update(np.ascontiguousarray(lists.values).tobytes())
        return lengths.digest() + values.digest()


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of different lengths, end to end: list `i` is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray | pa.Array, path: Path, name: str) -> Ragged:
        """A list column of a Parquet file; null lists are empty."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise ReportError(f"{path}: column {name!r} holds {array.type}, not lists; {REMEDY}")
        lengths = np.asarray(array.value_lengths().fill_null(0), dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return cls(array.flatten().to_numpy(zero_copy_only=False), offsets)

    @classmethod
    def concatenate(cls, pieces: list[Ragged]) -> Ragged:
        """The lists of all pieces, in order."""
        if not pieces:
            return cls(np.empty(0), np.zeros(1, dtype=np.int64))
        lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return cls(np.concatenate([piece.values for piece in pieces]), offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists of those rows, in that order."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        shift = np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)

    def same(self, other: Ragged) -> bool:
        """Whether every list equals the other's."""
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.values, other.values)


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


def read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Those columns of a Parquet file; a missing file or column, or a broken file, is a ReportError.

    A column that older run folders lack is 0 in each row.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns if name not in names]
            late = [name for name in missing if name in ADDED_LATER]
            if len(late) < len(missing):
                missing = [name for name in missing if name not in late]
                raise ReportError(f"{path} lacks column(s) {', '.join(missing)} (docs/files.md lists them); {REMEDY}")
            table = file.read(columns=[name for name in columns if name not in late])
            for name in late:
                table = table.append_column(name, pa.array(np.zeros(table.num_rows, dtype=np.int64)))
            return table
    except FileNotFoundError:
        raise ReportError(f"{path} is missing; {REMEDY}") from None
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)}); {REMEDY}") from None


def _names(path: Path) -> list[str]:
    """The columns of a Parquet file that was read before."""
    with pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def _batches(path: Path, column: str) -> Iterator[pa.Array]:
    """A column, a few thousand rows at a time."""
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ReportError(f"{path} lacks column {column} (docs/files.md lists them); {REMEDY}")
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                yield batch.column(0)
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)}); {REMEDY}") from None


def _arrays(path: Path, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    table = read_table(path, columns)
    arrays = {}
    for name in columns:
        column = table.column(name)
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


def _no_rows(columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.empty(0, dtype=object if name in TEXT_COLUMNS else np.float64) for name in columns}


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
        return RunFiles(run_dir, manifest, _no_rows(REQUEST_COLUMNS), _no_rows(STEP_COLUMNS))
    steps = _arrays(run_dir / STEPS_FILE, STEP_COLUMNS)
    _check_ledger(run_dir / STEPS_FILE, steps)
    path = run_dir / REQUESTS_FILE
    requests = _arrays(path, REQUEST_COLUMNS)
    later = tuple(name for name in LATER_REQUEST_COLUMNS if name in _names(path))
    return RunFiles(run_dir, manifest, requests | _arrays(path, later), steps)
