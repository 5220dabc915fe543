"""Where a sweep's cells lie: one folder each, named so that a person, a shell and Hydra can read it.

    paged-static-seed1-3f9c-r0
    |            |     |    +-- round, where the sweep has rounds
    |            |     +------- first digits of the cell's key: config, code and machine
    |            +------------- settings of the sweep, where they are short
    +-------------------------- strategy

A folder belongs to one cell for good: its file `.cell` holds the whole key, and is there before anything else. So a
sweep adds its cells to whatever lies in its folder, and a cell of other code or of another machine gets its own.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.sources import digest
from kvarena.reports.reading.names import CELL_FILE, CLAIM_FILE
from kvarena.reports.reading.writing import writing

FIRST_DIGITS, MORE_DIGITS = 4, 2
MOST_TOKEN, MOST_STEM = 32, 80  # characters of one setting, and of a folder's name before its digits


def stem_of(names: list[str], settings: dict[str, str]) -> str:
    """The readable part of a folder's name.

    Args:
        names: allocator and scheduler, or what else names the cell.
        settings: the sweep's other settings by their keys. One whose value has characters that a shell or Hydra wants
            quoted, or is long, is left out: the digits tell such cells apart.
    """
    stem = "-".join(_plain(name) for name in names)[:MOST_STEM]
    for key, value in settings.items():
        token = f"{key.rsplit('.', 1)[-1].lstrip('+~')}{value}"
        if re.fullmatch(r"[A-Za-z0-9._-]+", token) and len(token) <= MOST_TOKEN and len(stem) + len(token) < MOST_STEM:
            stem += f"-{token}"
    return stem


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", name).strip("_.") or "cell"


class CellFolders:
    """The cells' folders of one sweep's folder.

    Args:
        parent: the sweep's folder; made where it is missing.

    Raises:
        OSError: it cannot be made or read.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        parent.mkdir(parents=True, exist_ok=True)
        self._owned: dict[str, Path] = {}  # whole key -> folder
        self._like: dict[str, Path] = {}  # config and round -> the folder with the newest result of any code
        for folder in sorted((path for path in parent.iterdir() if path.is_dir()), key=_age):
            if (owner := owner_of(folder)) is not None:
                self._owned.setdefault(owner, folder)
            if (like := result_in(folder)) is not None:
                self._like[like] = folder

    def claim(self, stem: str, key: dict[str, Any], *, allow_mixed: bool = False, plain: bool = False) -> Path:
        """The folder of the cell with `key`: the one that it has, else a new one.

        Args:
            stem: the readable part of a new one's name.
            key: of the cell, as `cell_key` gives it.
            allow_mixed: take a folder with a result of the same config by other code or another machine, too.
            plain: call a new one by the stem alone, where that is free.

        Raises:
            ConfigError: there is no free name.
            NotWritten: the folder cannot be made.
        """
        whole = whole_key(key)
        if (folder := self._owned.get(whole)) is not None:
            return folder
        if allow_mixed and (folder := self._like.get(result_of(key))) is not None:
            return folder
        short = digest([key["config"], key["code"], key["machine"]])
        end = "" if key["round"] is None else f"-r{key['round']}"
        names = [f"{stem}-{short[:count]}{end}" for count in range(FIRST_DIGITS, len(short) + 1, MORE_DIGITS)]
        for name in [stem, *names] if plain else names:
            folder = self.parent / name
            if _take(folder, whole):
                self._owned[whole] = folder
                return folder
        raise ConfigError(f"{self.parent} has no free name for {stem}; sweep into another folder (hydra.sweep.dir=DIR)")


def whole_key(key: dict[str, Any]) -> str:
    """What a folder's `.cell` holds."""
    return digest([key["config"], key["code"], key["machine"], key["round"]])


def result_of(key: dict[str, Any]) -> str:
    """What a result is of, whatever code and machine it is from."""
    return digest([key["config"], key["round"]])


def result_in(folder: Path) -> str | None:
    """`result_of` the finished result in a folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / CELL_FILE).read_text())
        return result_of(found)
    except (OSError, ValueError, KeyError, TypeError):  # whoever runs a cell there says what is wrong
        return None


def _age(folder: Path) -> tuple[float, str]:
    """When the folder's result was finished, oldest first; folders without one before all."""
    try:
        return (folder / CELL_FILE).stat().st_mtime, folder.name
    except OSError:
        return 0.0, folder.name


def owner_of(folder: Path) -> str | None:
    """The whole key of the cell that `folder` belongs to; None where it is nobody's."""
    try:
        return (folder / CLAIM_FILE).read_text().strip()
    except OSError:
        return None


def _take(folder: Path, whole: str) -> bool:
    """Whether `folder` is now the cell's; of two processes that want it at once, one is told no."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if owner_of(folder) is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            return False  # somebody else's, or a result from before folders had owners
        written = folder / f".{uuid.uuid4().hex}"
        try:
            written.write_text(f"{whole}\n")
            os.link(written, folder / CLAIM_FILE)  # with its content, or not at all
        except FileExistsError:
            pass
        finally:
            written.unlink(missing_ok=True)
    return owner_of(folder) == whole
