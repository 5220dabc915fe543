"""Why a cell did not run, in its folder. Imports nothing heavy: most reasons are known before torch is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.lock import is_held
from kvarena.experiments.folders.place import check_place, is_finished, is_ours
from kvarena.reports.reading.errors import NotWritten
from kvarena.reports.reading.names import ERROR_FILE
from kvarena.reports.reading.writing import write_text


def record_failure(message: str, kind: str, *, not_defined: bool) -> None:
    """Leave `message` in the cell's folder, but not in one that is another's, finished, or being written.

    Args:
        message: why the cell did not run.
        kind: of the cell: RUN or EXPERIMENT.
        not_defined: its settings mean nothing together.
    """
    hydra = HydraConfig.get()
    write_failure(Path(hydra.runtime.output_dir), list(hydra.overrides.task), message, kind, not_defined=not_defined)


def write_failure(folder: Path, overrides: list[str], message: str, kind: str, *, not_defined: bool) -> None:
    """The same of a cell outside of a Hydra job.

    Args:
        folder: the cell's.
        overrides: what made it.
        message: why it did not run.
        kind: as of `record_failure`.
        not_defined: its settings mean nothing together.
    """
    if not _may_write(folder, kind):
        return
    record = {"overrides": overrides, "error": message, "not_defined": not_defined}
    try:
        write_text(folder / ERROR_FILE, json.dumps(record) + "\n")
    except NotWritten as error:  # the message itself is on stderr
        print(f"warning: {error}", file=sys.stderr)


def _may_write(folder: Path, kind: str) -> bool:
    if is_finished(folder) or is_held(folder):
        return False
    try:
        check_place(folder, kind)
    except ConfigError:
        return False
    # Beside files of which none is ours a note would be litter; an empty folder was made for this cell.
    return is_ours(folder) or not any(folder.iterdir())
