"""Packs the cells of experiment=record as the repository keeps them, and unpacks them (docs/simulator.md).

python run.py experiment=record hydra.run.dir=DIR         # on the GPU machine
kvarena make recordings keep DIR TARGET --commit HASH     # two files a model
kvarena make recordings folders TARGET RUNS               # run folders of their cells
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.recordings import make_folders, read_cell, write_recording
from kvarena.experiments.studies.calibration_cells import CELLS
from kvarena.experiments.studies.record import cell_of, rate_served
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.names import CELL_FILE


def keep(source: Path, target: Path, commit: str | None = None) -> list[Path]:
    """Pack the finished cells of an experiment's folder; returns the files.

    Args:
        source: folder of `experiment=record`.
        target: made if need be.
        commit: that was measured, of a copy that does not know; None: what the manifests say.

    Raises:
        ConfigError: there are no such cells.
    """
    models: dict[str, list[dict[str, Any]]] = defaultdict(list)
    found = [read_cell(mark.parent) for mark in source.glob(f"cells/*/{CELL_FILE}")]
    # Of a cell that ran again, by other code or with other settings, the last.
    last = {cell["manifest"]["name"]: cell for cell in sorted(found, key=lambda cell: cell["manifest"]["created"])}
    for cell in sorted(last.values(), key=lambda cell: CELLS.index(cell_of(cell["manifest"]))):
        manifest, known = cell["manifest"], cell_of(cell["manifest"])
        manifest |= {"name": known.name, "calibration": known.facts(rate_served(manifest))}
        if commit is not None:
            manifest["git"] = {"commit": commit, "dirty": False}
        models[manifest["model"]["name"]].append(cell)
    if not models:
        raise ConfigError(f"{source} holds no finished cells; give the folder of python run.py experiment=record")
    target.mkdir(parents=True, exist_ok=True)
    return [file for model, cells in models.items() for file in write_recording(cells, target, model)]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="pack cells as the repository keeps them")
    keeping.add_argument("source", type=Path, help="the folder of experiment=record")
    keeping.add_argument("target", type=Path, help="the folder to make")
    keeping.add_argument("--commit", help="that was measured; default: what the runs say")
    making = commands.add_parser("folders", help="make run folders of recorded cells")
    making.add_argument("source", type=Path, help="a folder of recordings")
    making.add_argument("target", type=Path, help="the folder to make")
    args = parser.parse_args(argv)
    packs = args.command == "keep"
    made = keep(args.source, args.target, args.commit) if packs else make_folders(args.source, args.target)
    for path in made:
        print(path)
    return 0
