"""Strict reading of trace files: every error names file, line and column (both counted from 1)."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_READ_ERRORS = (OSError, EOFError, zlib.error)


def trace_path(path: str | None) -> Path:
    """The file that `workload.path` names. Raises ConfigError when it is not set."""
    if not path:
        raise ConfigError("workload.path=null: this workload reads a file; set workload.path=FILE")
    return Path(path).expanduser()


def open_trace(path: Path) -> BinaryIO:
    """Open a trace for reading bytes; `.gz` is decompressed. Raises TraceError when it cannot be opened."""
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}; check workload.path") from error


def fail(path: Path, line: int, column: str | int, message: str) -> NoReturn:
    """Raise the TraceError of one place in a file."""
    raise TraceError(f"{path}: line {line}, column {column}: {message}")


def read_failed(path: Path, line: int, error: Exception) -> NoReturn:
    """Raise the TraceError of a file that broke off while it was read."""
    raise TraceError(f"{path}: line {line}, column 1: the file cannot be read on: {error}") from error


def length_problem(value: int, at_least: int) -> str | None:
    """What is wrong with a length in tokens; None when nothing is."""
    if value < at_least:
        return f"{value} must be at least {at_least}"
    if value > MAX_LENGTH:
        return f"{value} is too large; at most {MAX_LENGTH} tokens are read"
    return None


class CsvReader:
    """Rows of a CSV file by column name.

    LF and CRLF, with or without a final newline or a byte-order mark. Blank lines, missing columns and rows of another
    width are errors.

    Args:
        path: the file; `.gz` is decompressed.
        required: names that the header must have, in any order.
        optional: names that it may have.
        allow_extra: whether it may have others too, which are not read.

    Raises:
        TraceError: the file cannot be opened, or its header is wrong.
    """

    def __init__(
        self, path: Path, required: Sequence[str], optional: Sequence[str] = (), *, allow_extra: bool = False
    ) -> None:
        self.path = path
        # Bytes that are not UTF-8 are kept as surrogates, so that the cell they are in is the one that is reported.
        text = io.TextIOWrapper(open_trace(path), encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._file = text
        self._reader = csv.reader(text, strict=True)
        self.line = 1
        header = self._next()
        if header is None:
            fail(path, 1, 1, f"the file is empty; it needs the header {','.join(required)}")
        self._names = header
        self._columns = {name: index for index, name in enumerate(header)}
        if len(self._columns) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            fail(path, 1, self._column(twice), "this name occurs twice in the header")
        for index, name in enumerate(header):
            if name not in required and name not in optional and not allow_extra:
                fail(path, 1, f"{name[:40]!a} ({index + 1})", f"unknown column; expected {','.join(required)}")
        for name in required:
            if name not in self._columns:
                fail(path, 1, len(header), f"the header lacks the column {name!r}; expected {','.join(required)}")

    def has(self, name: str) -> bool:
        """True when the file has this column."""
        return name in self._columns

    def __iter__(self) -> Iterator[list[str]]:
        """The rows after the header, as text; `line` is the current one."""
        try:
            while (row := self._next()) is not None:
                if len(row) != len(self._names):
                    self._bad_width(row)
                yield row
        finally:
            self._file.close()

    def _next(self) -> list[str] | None:
        try:
            row = next(self._reader, None)
        except csv.Error as error:
            fail(self.path, self._reader.line_num, 1, f"not CSV: {error}")
        except _READ_ERRORS as error:
            read_failed(self.path, self._reader.line_num + 1, error)
        self.line = self._reader.line_num
        return row

    def _bad_width(self, row: list[str]) -> NoReturn:
        num = len(self._names)
        if not row:
            fail(self.path, self.line, 1, "the line is empty; remove it")
        where = self._column(self._names[len(row)]) if len(row) < num else str(num + 1)
        fail(self.path, self.line, where, f"the row has {len(row)} columns, the header has {num}")

    def _column(self, name: str) -> str:
        return f"{name[:40]!a} ({self._columns[name] + 1})"

    def bad(self, name: str, message: str) -> NoReturn:
        """Raise the TraceError of the current line's cell `name`."""
        fail(self.path, self.line, self._column(name), message)

    def text(self, row: list[str], name: str) -> str:
        """The cell `name` as it stands."""
        value = row[self._columns[name]]
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            self.bad(name, f"{value!a} is not UTF-8")
        return value

    def length(self, row: list[str], name: str, at_least: int) -> int:
        """The cell `name` as a length in tokens: decimal digits only, in [at_least, 10^7]."""
        value = row[self._columns[name]]
        if value.isascii() and value.isdigit() and len(value) <= 19:
            number = int(value)
            if at_least <= number <= MAX_LENGTH:
                return number
        return self._bad_length(value, name, at_least)

    def _bad_length(self, value: str, name: str, at_least: int) -> NoReturn:
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            self.bad(name, f"{value[:40]!a} is not an integer; write a number of tokens in decimal digits")
        if len(digits) > 19:
            self.bad(name, f"a number of {len(digits)} digits is too large; at most {MAX_LENGTH} tokens are read")
        self.bad(name, str(length_problem(int(value), at_least)))

    def seconds(self, row: list[str], name: str) -> float:
        """The cell `name` as a time in seconds: a finite decimal number of at least 0."""
        value = row[self._columns[name]]
        number = float(value) if _NUMBER.fullmatch(value) else math.nan
        if not (math.isfinite(number) and number >= 0):
            self.bad(name, f"{value[:40]!a} is not a time; write finite seconds of at least 0")
        return number


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a JSONL file as (line number, text without its line end).

    Raises:
        TraceError: the file cannot be read, a line is blank, or not UTF-8.
    """
    line = 0
    with open_trace(path) as file:
        try:
            for raw in file:
                line += 1
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    fail(path, line, error.start + 1, "not UTF-8")
                if not text.strip():
                    fail(path, line, 1, "the line is empty; remove it")
                yield line, text
        except _READ_ERRORS as error:
            read_failed(path, line + 1, error)
    if line == 0:
        fail(path, 1, 1, "the file is empty")
