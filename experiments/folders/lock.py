"""One process at a time writes into a folder: a lock of the kernel's, which ends with its process however that ends.

Imports nothing heavy: most reasons why a cell does not run are known before torch is loaded.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarena.reports.reading.names import LOCK_FILE
from kvarena.reports.reading.writing import writing


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; waits, and says so, while another one has it. The file that carries it stays.

    Raises:
        NotWritten: the folder cannot be written.
    """
    with writing(folder):
        carrier = (folder / LOCK_FILE).open("a")
    with carrier as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process is writing it; waiting until it is done", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"warning: {folder} cannot be locked ({error.strerror}); let no second process run into it",
                file=sys.stderr,
            )
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder`. Makes no file."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever wrote there, or locks do not work there
        return False
    return False
