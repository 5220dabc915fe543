"""Which cells of a sweep are done, so that a sweep that was cut off goes on where it stopped.

A cell's last file, cell.json, says what it ran: a hash of its config, the code and the machine. It is renamed into
place when all others are written, so a folder without it is not finished, whatever else lies there. One process at a
time works in a folder; the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.errors import ConfigError
from experiments.recording.files import CELL_FILE, ERROR_FILE, LOCK_FILE
from experiments.recording.provenance import code_state, machine
from reports.files import read_json

# Sections that change neither what is measured nor how.
UNMEASURED = ("report", "sweep", "study", "server", "tracking")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; waits, and says so, while another one has it.

    The lock is the kernel's and ends with its process, however that ends; the file that carries it stays.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        carrier = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); choose another folder") from error
    with carrier as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process is writing it; waiting until it is done", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"warning: {folder} cannot be locked ({error.strerror}); let no second process run into it",
                file=sys.stderr,
            )
        yield


def cell_key(cfg: DictConfig, choices: dict[str, str]) -> dict[str, str]:
    """What a cell's result depends on: hashes of its config, the code and the machine.

    Args:
        cfg: the cell's resolved config.
        choices: the config groups that name it.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    measured = {str(key): value for key, value in config.items() if key not in UNMEASURED}
    return {
        "config": _digest({"config": measured, "choices": choices}),
        "code": code_state(),
        "machine": _digest({key: value for key, value in machine().items() if key != "memory_bytes"}),
    }


def is_finished(run_dir: Path, key: dict[str, str], *, allow_mixed: bool) -> bool:
    """Whether `run_dir` holds the finished result of `key`; what an unfinished one left of errors is removed.

    Raises:
        ConfigError: it holds another cell's result, or one of other code or another machine and `allow_mixed` is not
            set.
        ReportError: its cell.json is broken.
    """
    path = run_dir / CELL_FILE
    if not path.exists():
        (run_dir / ERROR_FILE).unlink(missing_ok=True)
        return False
    found = read_json(path, dict.fromkeys(key, "text"), f"remove {run_dir} to measure it again")
    if found["config"] != key["config"]:
        raise ConfigError(
            f"{run_dir} holds the result of another config; sweep into a folder of its own (hydra.sweep.dir=DIR), or "
            "remove that one"
        )
    differs = [name for name in ("code", "machine") if found[name] != key[name]]
    if differs and not allow_mixed:
        raise ConfigError(
            f"{run_dir} was measured with other {' and another '.join(differs)}; remove it to measure it again, or "
            "set sweep.allow_mixed=true to keep it"
        )
    return True


def mark_finished(run_dir: Path, key: dict[str, str]) -> None:
    """Write cell.json; call when all other files are there."""
    partial = run_dir / f"{CELL_FILE}.partial"
    partial.write_text(json.dumps(key, indent=2) + "\n")
    partial.rename(run_dir / CELL_FILE)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
