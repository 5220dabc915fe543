"""Which cells of a sweep are done, so that a sweep that was cut off goes on where it stopped.

A cell's cell.json says what it ran: hashes of its config, the code and the machine, and its round. It is renamed into
place when all that was measured is written, so a folder without it is not finished, whatever else lies there. One
process at a time works in a folder; the others wait for it (experiments/folders/lock.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.provenance import machine
from kvarena.experiments.folders.sources import (
    REPORTS_PACKAGE,
    UNMEASURED,
    digest,
    inputs_of,
    package_digest,
    sources_of,
)
from kvarena.experiments.settings.config import RunConfig
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import CELL_FILE, ERROR_FILE
from kvarena.reports.reading.shapes import MAYBE_INTEGER, MAYBE_TEXT
from kvarena.reports.reading.writing import write_text, writing

CELL = {"config": str, "code": str, "machine": str, "round": MAYBE_INTEGER, "reports": MAYBE_TEXT}


def measured_config(values: dict[str, Any]) -> dict[str, Any]:
    """The sections of a resolved config that say what is measured."""
    return {key: value for key, value in values.items() if key not in UNMEASURED}


def cell_key(config: RunConfig, choices: dict[str, str]) -> dict[str, Any]:
    """The key of a cell; see `key_of`."""
    return key_of(config.values, choices)


def key_of(values: dict[str, Any], choices: dict[str, str]) -> dict[str, Any]:
    """What a cell's result depends on: hashes of its config, the code and the machine, and its round.

    Args:
        values: the cell's config, resolved.
        choices: the config groups that name it.

    Returns:
        `config` (with the content of the files that it names), `code` (`manifest.sources`, the hash), `machine`,
        `round`, and `reports`: the code that made its report, which is made again where that has changed.
    """
    config = measured_config(values)
    return {
        "config": digest({"config": config, "choices": choices, "inputs": inputs_of(config)}),
        "code": sources_of(config)["hash"],
        "machine": digest({key: value for key, value in machine().items() if key != "memory_bytes"}),
        "round": values["sweep"]["round"],
        "reports": package_digest(REPORTS_PACKAGE),
    }


def finished_key(run_dir: Path, key: dict[str, Any], *, allow_mixed: bool) -> dict[str, Any] | None:
    """What cell.json of `run_dir` says, where it holds the finished result of `key`; None where it holds none.

    Raises:
        ConfigError: it holds another cell's result, or one of other code or another machine and `allow_mixed` is not
            set.
        ReportError: its cell.json is broken.
    """
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
    """Write cell.json, and remove what an earlier try left of an error.

    Args:
        run_dir: holds all that was measured.
        key: of the cell; `reports` is None where its report is still to be made.

    Raises:
        NotWritten: the folder cannot be written.
    """
    write_text(run_dir / CELL_FILE, json.dumps(key, indent=2) + "\n")
    with writing(run_dir):
        (run_dir / ERROR_FILE).unlink(missing_ok=True)
