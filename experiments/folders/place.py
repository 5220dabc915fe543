"""What a folder holds, and whether a run, a sweep or an experiment may go into it. Nothing here writes.

    DIR/cell.json, manifest.json        a run           DIR/CELL/.cell           a sweep
    DIR/sweep.json                      a sweep         DIR/cells/CELL/.cell     an experiment
    DIR/study.json                      an experiment   DIR/.lock                one of these, which left no result

Whoever finds something else there is refused before the first byte, so that what was finished stays as it was.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from kvarena.engine.errors import ConfigError
from kvarena.reports.reading.names import (
    CELL_FILE,
    CLAIM_FILE,
    DATA_FILES,
    ERROR_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    REPORT_FILES,
    STUDY_FILE,
    SWEEP_FILE,
)

RUN, SWEEP, EXPERIMENT = "a run", "a sweep", "an experiment"
MARKS = (CELL_FILE, CLAIM_FILE, LOCK_FILE, SWEEP_FILE, STUDY_FILE, ERROR_FILE)  # who left one of these is one of us
# What one of the three writes under a name that others use as well.
WRITTEN = (MANIFEST_FILE, *DATA_FILES, *REPORT_FILES, ".hydra", "cells", "multirun.yaml", "comparison.csv", "runs.csv",
           "claims.csv")  # fmt: skip
MOST_NAMES = 3


def kind_of(folder: Path) -> str | None:
    """RUN, SWEEP or EXPERIMENT: what left something in `folder`; None where none of them did."""
    if (folder / STUDY_FILE).exists() or _any(folder, f"cells/*/{CLAIM_FILE}"):
        return EXPERIMENT
    if (folder / SWEEP_FILE).exists() or _any(folder, f"*/{CLAIM_FILE}"):
        return SWEEP
    if (folder / CELL_FILE).exists() or ((folder / MANIFEST_FILE).exists() and is_ours(folder)):
        return RUN
    return None


def is_ours(folder: Path) -> bool:
    """Whether a run, a sweep or an experiment has worked in `folder`."""
    return any((folder / name).exists() for name in MARKS)


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds the whole result of a run, a sweep or an experiment."""
    return any((folder / name).exists() for name in (CELL_FILE, SWEEP_FILE, STUDY_FILE))


def _any(folder: Path, pattern: str) -> bool:
    with suppress(OSError):
        return next(folder.glob(pattern), None) is not None
    return False


def check_place(folder: Path, kind: str, experiment: str | None = None) -> None:
    """Refuse a folder that belongs to something else.

    Args:
        folder: where files will go.
        kind: of what will write them: RUN, SWEEP or EXPERIMENT.
        experiment: its name, of an experiment.

    Raises:
        ConfigError: `folder` holds a result of another kind, of another experiment, or files that are not ours and
            that would be replaced.
    """
    setting = "hydra.sweep.dir" if kind == SWEEP else "hydra.run.dir"
    found = kind_of(folder)
    if found not in (None, kind):
        raise ConfigError(f"{folder} is the folder of {found}; give {kind} one of its own ({setting}=DIR)")
    if found == EXPERIMENT and (name := _experiment_in(folder)) not in (None, experiment):
        raise ConfigError(
            f"{folder} is the folder of experiment={name}; give experiment={experiment} one of its own ({setting}=DIR)"
        )
    if found is None and not is_ours(folder) and (strange := [name for name in WRITTEN if (folder / name).exists()]):
        names = ", ".join(strange[:MOST_NAMES]) + (", ..." if len(strange) > MOST_NAMES else "")
        raise ConfigError(
            f"{folder} holds files of something else ({names}), which {kind} would replace; give it a folder of its "
            f"own ({setting}=DIR)"
        )


def _experiment_in(folder: Path) -> str | None:
    """The name of the experiment whose result is in `folder`; None where it cannot be told."""
    try:
        found = json.loads((folder / STUDY_FILE).read_text())
    except (OSError, ValueError):
        return None
    name = found.get("experiment") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None
