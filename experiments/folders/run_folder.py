"""Puts a run's files into its folder: all of them, or none and those of before.

DIR/.partial/*    every file, written whole    --renamed one by one, manifest.json last-->    DIR/*
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kvarena.reports.reading.errors import NotWritten
from kvarena.reports.reading.names import DATA_FILES, MANIFEST_FILE, REPORT_FILES
from kvarena.reports.reading.writing import writing

PARTIAL = ".partial"
Write = Callable[[Path], None]  # writes the Parquet files of a run into a folder


@dataclass(frozen=True)
class Measured:
    """What a run came to.

    Attributes:
        facts: what the manifest says of it; `run.interrupted` is not None where it did not come to its end.
        write: its Parquet files.
        error: what ended it early; None of a run that came to its end, or that a signal ended between two steps.
    """

    facts: dict[str, Any]
    write: Write
    error: BaseException | None = None


def write_run(run_dir: Path, manifest: dict[str, Any], write: Write) -> None:
    """Write a run's files in place of those that an earlier try left, and remove the rest of these.

    Args:
        run_dir: the run's folder.
        manifest: of the run.
        write: its Parquet files.

    Raises:
        NotWritten: the folder cannot hold them. It is as it was; what was measured is in a temporary folder that the
            message names, if that could hold it.
    """
    try:
        put_files(run_dir, manifest, write)
    except NotWritten as error:
        spare = Path(tempfile.mkdtemp(prefix="kvarena-run-"))
        try:
            put_files(spare, manifest, write)
        except NotWritten:
            shutil.rmtree(spare, ignore_errors=True)
            raise error from None
        raise NotWritten(f"{error}; what was measured is in {spare} (kvarena report {spare})") from error


def put_files(run_dir: Path, manifest: dict[str, Any], write: Write, *, keeps_report: bool = False) -> None:
    """The same without another folder where this one cannot hold the files.

    Args:
        run_dir, manifest, write: see `write_run`.
        keeps_report: a report of the files of before stays; else it is removed.

    Raises:
        NotWritten: the folder cannot hold them, and is as it was.
    """
    partial = run_dir / PARTIAL
    try:
        with writing(run_dir):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, default=str) + "\n")
            written = sorted((path.name for path in partial.iterdir()), key=lambda name: name == MANIFEST_FILE)
            for name in (MANIFEST_FILE, *DATA_FILES, *(() if keeps_report else REPORT_FILES)):
                if name == "figures":
                    shutil.rmtree(run_dir / name, ignore_errors=True)
                elif name not in written or name == MANIFEST_FILE:
                    (run_dir / name).unlink(missing_ok=True)
            for name in written:
                os.replace(partial / name, run_dir / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_hydra(folder: Path, cfg: DictConfig) -> None:
    """Write `.hydra`: the config as Hydra composed it and the overrides of the command line.

    Hydra itself would write it before anything is checked, and so into finished runs of which the job is refused.

    Args:
        folder: of a run or an experiment.
        cfg: the job's config, without the hydra node.

    Raises:
        NotWritten: it cannot be written.
    """
    hydra = HydraConfig.instance().cfg  # its own node alone, below its name
    assert hydra is not None
    hidden = folder / ".hydra"
    with writing(hidden):
        hidden.mkdir(exist_ok=True)
        OmegaConf.save(cfg, hidden / "config.yaml")
        OmegaConf.save(hydra, hidden / "hydra.yaml")
        OmegaConf.save(HydraConfig.get().overrides.task, hidden / "overrides.yaml")
