"""Parquet files say what they hold, and docs/files.md says the same."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.experiments.load.http_metrics import GaugeReader
from kvarena.experiments.recording.merged import write_routing
from kvarena.experiments.recording.reuse_file import write_reuse
from kvarena.experiments.recording.scores import ScoreLog
from kvarena.experiments.recording.served.prefixes import write_prefixes
from kvarena.reports.reading.columns import SCHEMA_VERSION, TABLES, names_of

DOCS = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")


def markdown(file):
    """The table of docs/files.md."""
    rows = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    for columns in TABLES[file]:
        names = ", ".join(f"`{name}`" for name in columns.names)
        rows.append(f"| {names} | {columns.kind} | {columns.unit} | {columns.meaning} |")
    return "\n".join(rows)


@pytest.mark.parametrize("file", TABLES)
def test_the_docs_print_the_tables(file):
    assert markdown(file) in DOCS


@pytest.mark.parametrize("file", TABLES)
def test_a_file_says_what_its_columns_are(file, comparison, tmp_path):
    folder = comparison[0].folder
    if file == "scores.parquet":
        folder = tmp_path
        ScoreLog().write(folder / file)
    elif file == "prefixes.parquet":
        folder = tmp_path
        write_prefixes(folder / file, ["a"], 16, [np.array([1, -2])])
    elif file == "gauges.parquet":
        folder, reader = tmp_path, GaugeReader(None, "", 1.0)
        reader.rows.append({"time": 0.5})
        reader.write(folder)
    elif file == "routing.parquet":
        folder = tmp_path
        write_routing(folder / file, np.zeros(1, dtype=np.int32), np.zeros(1))
    elif file == "reuse.parquet":
        folder = tmp_path
        write_reuse(folder / file, {name: np.zeros(0) for name in names_of(file)})
    schema = pq.read_schema(folder / file)
    assert schema.metadata[b"kvarena.schema_version"] == str(SCHEMA_VERSION).encode()
    assert schema.metadata[b"kvarena.file"] == file.encode()
    known = {name: columns for columns in TABLES[file] for name in columns.names}
    assert schema.names and set(schema.names) == known.keys()
    for field in schema:
        columns = known[field.name]
        assert field.metadata[b"meaning"].decode() == columns.meaning and columns.meaning
        assert field.metadata.get(b"unit", b"").decode() == columns.unit
        assert named(field.type) == columns.kind.removesuffix(", null")


def named(kind: pa.DataType) -> str:
    return f"list of {named(kind.value_type)}" if pa.types.is_list(kind) else str(kind)
