"""The folder of a server's recording: whose it may be, and one writer at a time.

DIR/manifest.json, *.parquet     the latest of what is served, as a run leaves its files
DIR/.recording                   empty: carries the kernel's lock of the process that writes here
DIR/engine-0/, engine-1/, ...    the same of each of several engines
DIR/before/                      what another server had recorded there, once this one has something to write
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.place import WRITTEN
from kvarena.reports.reading.names import DATA_FILES, MANIFEST_FILE, REPORT_FILES

LOCK, BEFORE, OF_ENGINE = ".recording", "before", "engine-"
SETTING = "server.record"
PRIVATE_FOLDER = 0o700
PATIENCE = 10.0


def engine_folder(base: str, rank: int, num_engines: int) -> Path:
    """Where a server's engine records: each of several has a folder of its own."""
    folder = Path(base).expanduser().absolute()
    return folder if num_engines == 1 else folder / f"{OF_ENGINE}{rank}"


def check_recording_place(folder: Path) -> None:
    """See that a recording may go into `folder`, which is made where it is not there.

    Raises:
        ConfigError: it holds something else, another server records there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        strange = [name for name in WRITTEN if (folder / name).exists()]
    except OSError as error:
        raise ConfigError(f"{SETTING}={folder} cannot be made: {error.strerror or error}") from None
    if strange and not is_recording(folder):
        raise ConfigError(
            f"{SETTING}={folder} holds files of something else ({', '.join(strange[:3])}), which a recording would "
            "replace; give it a folder of its own"
        )
    claim(folder).close()


def claim(folder: Path, patience: float = PATIENCE) -> IO[str]:
    """Hold the folder until what is returned is closed.

    Args:
        folder: of a recording.
        patience: seconds that another process has to leave it: one whose server has just ended writes its last files.

    Raises:
        ConfigError: another process has it, or no one may.
    """
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"{SETTING}={folder} cannot be written: {error.strerror or error}") from None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            file.close()
            raise ConfigError(
                f"{SETTING}={folder}: another server records there; give each a folder of its own"
            ) from None
        return file


def is_recording(folder: Path) -> bool:
    """Whether what lies there is a server's recording."""
    try:
        found = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("recording"), dict)


def set_aside(folder: Path) -> None:
    """Move an earlier recording to `before`, in place of one that lies there. Raises OSError."""
    names = [name for name in (*DATA_FILES, *REPORT_FILES, MANIFEST_FILE) if (folder / name).exists()]
    if MANIFEST_FILE not in names:
        return
    before = folder / BEFORE
    with suppress(FileNotFoundError):
        shutil.rmtree(before)
    before.mkdir(mode=PRIVATE_FOLDER)
    for name in names:
        os.replace(folder / name, before / name)
