"""Runs a study's cells: the study's own config with overrides per cell, each into a run folder of its own.

Cells that follow one another share the model, and the runner where nothing of it differs
(experiments/building/shared.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.folders.cell_folders import CellFolders, result_in, result_of
from kvarena.experiments.folders.cell_state import cell_key
from kvarena.experiments.folders.sources import digest
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.jobs.unserved import Unserved, why_unserved
from kvarena.experiments.settings.command_line import without_sweep
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.config import RunConfig

ALONE = "study=null"  # an experiment's config without its study is a single run's


class CellRunner:
    """Runs cells below one folder.

    Args:
        overrides: what the command line said, `experiment=...` included; the base of every cell.
        out_dir: the study's folder; a cell's run folder is `out_dir/cells/NAME`, or has digits behind the name where
            that holds the result of other settings, other code or another machine.
        command: the words of `overrides` as a command; None where nobody knows them.
    """

    def __init__(self, overrides: Sequence[str], out_dir: Path, command: Sequence[str] | None = None) -> None:
        self._overrides = list(overrides)
        self.out_dir = out_dir
        self._command = None if command is None else list(command)
        self.folders: list[Path] = []
        self._shared = SharedParts()
        self._places: CellFolders | None = None

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The config of a cell with these overrides, before it runs. Raises as `compose_cell`."""
        return compose_cell([*self._overrides, *overrides])[0]

    def run(self, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Run one cell and return its report's summary.

        Args:
            name: unique in the study; also the folder's name, so letters, digits, '.', '_', '-' and '=' only.
            overrides: on top of the study's, as on run.py's command line (`allocator=orca_max`).

        Raises:
            KvarenaError: the cell is badly set, failed, or finished no request.
        """
        config, choices = compose_cell([*self._overrides, *overrides])
        folder = self._folder(name, config, choices)
        self.folders.append(folder)
        command = None if self._command is None else [*self._command, ALONE, *without_sweep(overrides)]
        summary = self._execute(config, folder, name, choices, str(self.out_dir), command)
        if (reason := why_unserved(summary)) is not None:
            raise Unserved(reason, folder)
        return summary

    def rehearse(self, overrides: Sequence[str] = ()) -> None:
        """Run a cell that leaves nothing but what it warms: compiled kernels, a library's choices. Raises as `run`."""
        config, choices = compose_cell([*self._overrides, *overrides])
        with tempfile.TemporaryDirectory(prefix="kvarena-warm-up-") as folder:
            self._execute(replace(config, tracking=None), Path(folder), "warm-up", choices)

    def _execute(
        self, config: RunConfig, folder: Path, name: str, choices: dict[str, str], group: str | None = None,
        command: Sequence[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        try:
            return execute(config, folder, name, choices, group, self._shared, command)
        except BaseException:
            self._shared.clear()  # its runner may hold what the cell left undone
            raise

    def _folder(self, name: str, config: RunConfig, choices: dict[str, str]) -> Path:
        key, plain = cell_key(config, choices), self.out_dir / "cells" / name
        if config.sweep.allow_mixed and result_in(plain) == result_of(key):
            return plain
        if self._places is None:
            self._places = CellFolders(plain.parent)
        # Cells of two names may have the same settings, and are two runs all the same.
        return self._places.claim(name, key | {"config": digest([name, key["config"]])}, plain=True)
