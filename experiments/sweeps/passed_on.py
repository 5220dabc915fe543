"""A signal to a sweep whose cells run in child processes goes on to these, and the sweep waits for their end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvarena.experiments.recording.interruption import Signals
from kvarena.reports.reading.names import LOCK_FILE

LOOK = 0.1  # seconds between looks for a signal


@contextmanager
def cells_elsewhere(signals: Signals, sweep_dir: Path, *, here: bool) -> Iterator[None]:
    """In the block cells run in child processes, which are told once each when a signal comes.

    A launcher that is interrupted kills its children, and with them what they measured.

    Args:
        signals: of this process; noted only while the block lasts.
        sweep_dir: holds the cells' folders.
        here: cells run in this process or out of its reach: the block does nothing.
    """
    if here:
        yield
        return
    ended = threading.Event()
    passing = threading.Thread(target=_pass_on, args=(signals, sweep_dir.absolute(), ended), daemon=True)
    passing.start()
    try:
        with signals.patient():
            yield
    finally:
        ended.set()
        passing.join()


def _pass_on(signals: Signals, sweep_dir: Path, ended: threading.Event) -> None:
    told: set[int] = set()
    while not ended.wait(LOOK):
        for pid in _children_at_work(sweep_dir) - told if signals.came else ():
            told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _children_at_work(sweep_dir: Path) -> set[int]:
    """The children that hold a cell of the sweep: to others a signal would be the end, and to the launcher an error."""
    import psutil  # late: needed by what is interrupted alone

    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            names = [Path(file.path) for file in child.open_files()]
            if any(path.name == LOCK_FILE and sweep_dir in path.parents for path in names):
                found.add(child.pid)
    return found
