"""Files that are whole or not there: what is written takes its place in one step, when its last byte is on disk.

NAME.partial --all bytes written--> NAME        an error removes NAME.partial and leaves the NAME of before
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvarena.reports.reading.errors import NotWritten

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the block's operating system refuses is a NotWritten that names `place`, a file or a folder."""
    try:
        yield
    except OSError as error:
        raise NotWritten(cannot_write(place, error)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when the block ends; the folder is made.

    Raises:
        NotWritten: it cannot be written. `path` is then as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe is no file to replace
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole. Raises NotWritten."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole. Raises NotWritten, and ValueError of a number that is not finite."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Any], columns: Iterable[str]) -> None:
    """Write a table: rows by column or in their order; what a row has not, or is None, is an empty cell.

    Raises:
        NotWritten: it cannot be written.
    """
    import pandas as pd  # late: many write text alone

    # As objects: a column of whole numbers stays one where some are missing.
    frame = pd.DataFrame(rows, columns=list(columns), dtype=object)
    with replacing(path) as partial:
        frame.to_csv(partial, index=False)


def cannot_write(place: Path | str, error: OSError) -> str:
    """One line: what cannot be written, why, and what to do."""
    reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    if error.errno in NO_ROOM:
        remedy = "make room there, or choose another folder"
    elif error.errno in NOT_ALLOWED:
        remedy = "make the folder writable, or choose another one"
    else:
        remedy = "choose another folder"
    return f"cannot write {place} ({reason}); {remedy}"
