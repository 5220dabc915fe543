"""What tests are spared unless they look at it: 3 s of processor time for a page's figures, 1.3 s for a cell's probe.

Figures are made as ever, from the same data; what an own page shows of them is an empty picture. A test that looks at
pictures has the marker `drawn`, one that looks at the probe `probed`. Both hold for the processes of warm.py, too.
"""

from __future__ import annotations

import base64
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
EMPTY = '<svg width="1pt" height="1pt" viewBox="0 0 1 1" xmlns="http://www.w3.org/2000/svg"></svg>'
drawn = probed = False  # by the test that runs
_originals: dict[str, Any] = {}


def set_for_test(*, is_drawn: bool, is_probed: bool) -> None:
    """Spare the test that is about to run, or the process that starts, what it does not look at."""
    global drawn, probed
    drawn, probed = is_drawn, is_probed
    # Only what is loaded: a test that draws nothing does not pay for the import.
    _replace("matplotlib.figure", "Figure.savefig", _save_nothing, not drawn)
    _replace("kvarena.experiments.recording.contention", "run_probe", _quiet_machine, not probed)


@contextlib.contextmanager
def nothing_spared() -> Iterator[None]:
    """For fixtures whose pages several tests look at, whichever test is the first."""
    before = {"is_drawn": drawn, "is_probed": probed}
    set_for_test(is_drawn=True, is_probed=True)
    try:
        yield
    finally:
        set_for_test(**before)


def _replace(module: str, name: str, by: Any, spared: bool) -> None:
    if module not in sys.modules:
        return
    owner: Any = sys.modules[module]
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = _originals.setdefault(name, getattr(owner, last))
    setattr(owner, last, by if spared else original)


def _save_nothing(self: Any, file: str | Path | IO[str], *, format: str, **_: Any) -> None:
    if format == "svg":
        file.write(EMPTY)  # type: ignore[union-attr]
    else:
        Path(file).write_bytes(PIXEL)  # type: ignore[arg-type]


def _quiet_machine(*_: Any, **__: Any) -> Any:
    return sys.modules["kvarena.experiments.recording.contention"].Probe(1000.0, 0.0)
