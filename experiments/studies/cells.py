"""Runs a study's cells: the study's own config with overrides per cell, each into a run folder of its own.

Cells that follow one another share the model, and the runner where nothing of it differs
(experiments/building/shared.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.building.shared import SharedParts
from experiments.compose import compose_cell
from experiments.job import execute


class CellRunner:
    """Runs cells below one folder.

    Args:
        overrides: what the command line said, `experiment=...` included; the base of every cell.
        out_dir: the study's folder; a cell's run folder is `out_dir/cells/NAME`.
    """

    def __init__(self, overrides: Sequence[str], out_dir: Path) -> None:
        self._overrides = list(overrides)
        self.out_dir = out_dir
        self.folders: list[Path] = []
        self._shared = SharedParts()

    def run(self, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Run one cell and return its report's summary.

        Args:
            name: unique in the study; also the folder's name, so letters, digits, '.', '_', '-' and '=' only.
            overrides: on top of the study's, as on run.py's command line (`allocator=orca_max`).

        Raises:
            KvarenaError: the cell is badly set or failed.
        """
        cfg, choices = compose_cell([*self._overrides, *overrides])
        folder = self.out_dir / "cells" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.folders.append(folder)
        try:
            return execute(cfg, folder, name, choices, str(self.out_dir), self._shared)
        except BaseException:
            self._shared.clear()  # its runner may hold what the cell left undone
            raise
