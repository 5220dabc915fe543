"""Which cells of a sweep are done, so that a sweep that was cut off goes on where it stopped.

A cell's last file, cell.json, says what it ran: hashes of its config, the code and the machine, and its round. It is
renamed into place when all others are written, so a folder without it is not finished, whatever else lies there. One
process at a time works in a folder; the others wait for it.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.files import CELL_FILE, ERROR_FILE, LOCK_FILE
from kvarena.experiments.folders.provenance import machine
from kvarena.experiments.folders.sources import (
    REPORTS_PACKAGE,
    UNMEASURED,
    digest,
    inputs_of,
    package_digest,
    sources_of,
)
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.shapes import MAYBE_INTEGER, MAYBE_TEXT

CELL = {"config": "text", "code": "text", "machine": "text", "round": MAYBE_INTEGER, "reports": MAYBE_TEXT}


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


def measured_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved sections of a config that say what is measured."""
    sections = {str(key): cfg[key] for key in cfg if key not in UNMEASURED}
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in sections.items()
    }


def cell_key(cfg: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """What a cell's result depends on: hashes of its config, the code and the machine, and its round.

    Args:
        cfg: the cell's config, without the hydra node.
        choices: the config groups that name it.

    Returns:
        `config` (with the content of the files that it names), `code` (`manifest.sources`, the hash), `machine`,
        `round`, and `reports`: the code that made its report, which is made again where that has changed.
    """
    config = measured_config(cfg)
    return {
        "config": digest({"config": config, "choices": choices, "inputs": inputs_of(config)}),
        "code": sources_of(config)["hash"],
        "machine": digest({key: value for key, value in machine().items() if key != "memory_bytes"}),
        "round": cfg.sweep.round,
        "reports": package_digest(REPORTS_PACKAGE),
    }


def finished_key(run_dir: Path, key: dict[str, Any], *, allow_mixed: bool) -> dict[str, Any] | None:
    """What cell.json of `run_dir` says, where it holds the finished result of `key`; None where it holds none.

    What an earlier try left of errors is removed.

    Raises:
        ConfigError: it holds another cell's result, or one of other code or another machine and `allow_mixed` is not
            set.
        ReportError: its cell.json is broken.
    """
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    path = run_dir / CELL_FILE
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path, CELL, f"remove {run_dir} to measure it again")
    if found["config"] != key["config"] or found.get("round") != key["round"]:
        raise ConfigError(f"{run_dir} holds the result of another config; give a folder of its own, or remove that one")
    differs = differing(found, key)
    if differs and not allow_mixed:
        raise ConfigError(
            f"{run_dir} was measured with other {' and another '.join(differs)}; give a folder of its own, remove that "
            "one to measure it again, or set sweep.allow_mixed=true to keep it"
        )
    return found


def differing(found: dict[str, Any], key: dict[str, Any]) -> list[str]:
    """Which of code and machine are not those of `key`."""
    return [name for name in ("code", "machine") if found[name] != key[name]]


def mark_finished(run_dir: Path, key: dict[str, Any]) -> None:
    """Write cell.json; call when all other files are there."""
    partial = run_dir / f"{CELL_FILE}.partial"
    partial.write_text(json.dumps(key, indent=2) + "\n")
    partial.rename(run_dir / CELL_FILE)
