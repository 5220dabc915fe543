"""Recorded cells in few small files, as the repository keeps them.

    NAME-requests.parquet    a row a request, without its tokens; in its metadata the cells' manifests
    NAME-steps.parquet       a row a step, all columns of a run's steps.parquet

Times are in whole nanoseconds. Both have a column `cell`, the number of the manifest. `make_folders` makes run folders
of them, which the rest of the harness reads like any others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvarena.engine.errors import ConfigError
from kvarena.experiments.recording.record import BOUND, write_requests, write_steps
from kvarena.experiments.recording.request_log import LISTS, TIMES
from kvarena.reports.reading.columns import TABLES, schema_of
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE

REQUESTS, STEPS = "-requests.parquet", "-steps.parquet"
CELL = "cell"
MANIFESTS = b"manifests"
NANOSECONDS = 1e9
STEP_TIMES = tuple(name for columns in TABLES[STEPS_FILE] if columns.unit == "s" for name in columns.names)


def write_recording(cells: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write cells as `read_cell` gives them; returns the two files.

    Args:
        cells: each with `manifest`, `requests` and `steps`; the manifests say under `calibration` what they are for.
        folder: must exist.
        name: of the files.
    """
    steps = [_step_table(number, cell["steps"]) for number, cell in enumerate(cells)]
    requests = [_request_table(number, cell["requests"]) for number, cell in enumerate(cells)]
    paths = [folder / f"{name}{REQUESTS}", folder / f"{name}{STEPS}"]
    manifests = {MANIFESTS: json.dumps([cell["manifest"] for cell in cells]).encode()}
    tables = [pa.concat_tables(requests).replace_schema_metadata(manifests), pa.concat_tables(steps)]
    for path, table in zip(paths, tables, strict=True):
        numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
        pq.write_table(
            table, path, compression="zstd", compression_level=19, use_dictionary=False,
            column_encoding=dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
        )  # fmt: skip
    return paths


def read_recording(folder: Path, name: str) -> list[dict[str, Any]]:
    """The cells of one recording, as they were written; their requests have no tokens.

    Raises:
        ConfigError: a file is missing or is no recording.
    """
    try:
        requests, steps = (pq.read_table(folder / f"{name}{suffix}") for suffix in (REQUESTS, STEPS))
        manifests = json.loads((requests.schema.metadata or {})[MANIFESTS])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{folder / name}: not a recording of kvarena make recordings: {error}") from error
    nothing = dict.fromkeys(LISTS)
    rows = [_later(row) | row | nothing for row in requests.to_pylist()]
    columns = {column: steps.column(column).to_numpy() for column in steps.column_names}
    for column in STEP_TIMES:
        columns[column] = columns[column] / NANOSECONDS
    cells = []
    for number, manifest in enumerate(manifests):
        mask = columns[CELL] == number
        cells.append(
            {
                "manifest": manifest,
                "requests": [{k: v for k, v in row.items() if k != CELL} for row in rows if row[CELL] == number],
                "steps": {column: values[mask] for column, values in columns.items() if column != CELL},
            }
        )
    return cells


def _later(row: dict[str, Any]) -> dict[str, Any]:
    """What recordings of before lack: tokens came one by one, the last ended its request, no level lay below."""
    num_tokens = row["num_output_tokens"]
    last = row["finish_time"] if num_tokens else None
    return {
        "num_first_tokens": min(num_tokens, 1), "last_token_time": last, "num_loaded_tokens": 0, BOUND: None,
        "kind": "",
    }  # fmt: skip


def recording_names(folder: Path) -> list[str]:
    """The recordings of a folder. Raises ConfigError when there is none."""
    names = sorted(path.name.removesuffix(REQUESTS) for path in folder.glob(f"*{REQUESTS}"))
    if not names:
        raise ConfigError(
            f"{folder} holds no recordings (*{REQUESTS}); kvarena make recordings keep packs cells of experiment=record"
        )
    return names


def make_folders(source: Path, target: Path) -> list[Path]:
    """Make a run folder of every cell of every recording in `source`: TARGET/NAME-CELL; returns them."""
    made = []
    for name in recording_names(source):
        for cell in read_recording(source, name):
            folder = target / f"{name}-{cell['manifest']['name']}"
            folder.mkdir(parents=True, exist_ok=True)
            write_requests(folder / REQUESTS_FILE, cell["requests"])
            write_steps(folder / STEPS_FILE, cell["steps"])
            (folder / MANIFEST_FILE).write_text(json.dumps(cell["manifest"], indent=2) + "\n")
            made.append(folder)
    return made


def read_cell(folder: Path) -> dict[str, Any]:
    """A run folder as `write_recording` takes it. Raises ConfigError when it is none."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        requests, steps = (pq.read_table(folder / name) for name in (REQUESTS_FILE, STEPS_FILE))
    except (ReportError, OSError, pa.ArrowException) as error:
        raise ConfigError(f"{folder} is not a run folder: {error}") from error
    columns = {name: steps.column(name).to_numpy() for name in steps.column_names}
    return {"manifest": manifest, "requests": requests.to_pylist(), "steps": columns}


def _step_table(number: int, columns: dict[str, Any]) -> pa.Table:
    arrays = dict(columns)
    for name in STEP_TIMES:
        arrays[name] = np.round(arrays[name] * NANOSECONDS).astype(np.int64)
    return pa.table({CELL: np.full(len(arrays["step"]), number, dtype=np.int32), **arrays})


def _request_table(number: int, rows: Sequence[dict[str, Any]]) -> pa.Table:
    kept = [{CELL: number} | {key: value for key, value in row.items() if key not in LISTS} for row in rows]
    for row in kept:  # as the steps' times, so that what was before or after another still is
        row |= {key: round(row[key] * NANOSECONDS) / NANOSECONDS for key in TIMES if row[key] is not None}
    return pa.Table.from_pylist(kept, schema=_request_schema())


def _request_schema() -> pa.Schema:
    schema = schema_of(REQUESTS_FILE)
    fields = [pa.field(name, schema.field(name).type) for name in schema.names if name not in LISTS]
    return pa.schema([(CELL, pa.int32()), *fields])
