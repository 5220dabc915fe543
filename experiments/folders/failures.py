"""Why a cell did not run, in its folder. Imports nothing heavy: most reasons are known before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from kvarena.experiments.folders.files import ERROR_FILE


def record_failure(message: str, *, not_defined: bool) -> None:
    """Leave `message` in the cell's folder.

    Args:
        message: why the cell did not run.
        not_defined: its settings mean nothing together.
    """
    hydra = HydraConfig.get()
    write_failure(Path(hydra.runtime.output_dir), list(hydra.overrides.task), message, not_defined=not_defined)


def write_failure(folder: Path, overrides: list[str], message: str, *, not_defined: bool) -> None:
    """The same of a cell outside of a Hydra job.

    Args:
        folder: the cell's.
        overrides: what made it.
        message: why it did not run.
        not_defined: its settings mean nothing together.
    """
    (folder / ERROR_FILE).write_text(
        json.dumps({"overrides": overrides, "error": message, "not_defined": not_defined}) + "\n"
    )
