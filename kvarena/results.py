"""What `kvarena.run`, `sweep` and `load` give back: a folder's files as data frames and a typed summary.

    load(DIR) --> Result       a run        requests, steps, kv_map: one row per request, step, snapshot
              --> Comparison   a sweep      the same of all its runs, end to end, with the settings as columns
              --> Experiment   a study      the same of all its cells

Frames hold the columns of the Parquet files (docs/files.md) and, of requests, the latencies as the report has them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from kvarena.engine.errors import KvarenaError
from kvarena.reports.analysis.latency import DEFINITIONS, request_latencies
from kvarena.reports.comparing.cells import differing_settings, flatten
from kvarena.reports.reading.columns import SCHEMA_VERSION, VERSION_KEY
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import RunFiles, read_json, read_run
from kvarena.reports.reading.names import (
    KV_MAP_FILE,
    MANIFEST_FILE,
    REQUESTS_FILE,
    REUSE_FILE,
    STEPS_FILE,
    STUDY_FILE,
    SWEEP_FILE,
)
from kvarena.reports.reading.shapes import SWEEP
from kvarena.summaries import ComparisonSummary, ExperimentSummary, RunSummary

PAGE_FILE, SUMMARY_FILE = "report.html", "summary.json"
PAGE_HEIGHT = 720  # pixels of a page in a notebook
LATENCIES = {
    "ttft": "ttft_seconds",
    "tpot": "tpot_seconds",
    "e2e": "e2e_seconds",
    "queue_time": "queue_time_seconds",
    "normalized_latency": "normalized_latency_seconds_per_token",
}
Answer = TypeVar("Answer")
Typed = TypeVar("Typed", bound=BaseModel)


def _reading(read: Callable[..., Answer]) -> Callable[..., Answer]:
    """The same with a report's errors as a KvarenaError: what a caller catches is one class."""

    def reading(*arguments: Any) -> Answer:
        try:
            return read(*arguments)
        except ReportError as error:
            raise KvarenaError(str(error)) from None

    return reading


class _Folder:
    """A folder with a report."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}): {self._headline()}"

    def _headline(self) -> str:
        return str(self._summary["headline"])

    @cached_property
    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = _reading(read_json)(
            self.folder / SUMMARY_FILE, {"headline": str}, f"make it again: kvarena report {self.folder}"
        )
        return summary

    def _typed(self, kind: type[Typed]) -> Typed:
        try:
            return kind.model_validate(self._summary)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise KvarenaError(
                f"{self.folder / SUMMARY_FILE}: {where}: {first['msg']}; make it again: kvarena report {self.folder}"
            ) from None

    def _repr_html_(self) -> str:
        """The report's page, in a frame of its own; the headline where the run wrote no page."""
        try:
            page = (self.folder / PAGE_FILE).read_text(encoding="utf-8")
        except OSError:
            return f"<p>{html.escape(self._headline())}</p><p>{html.escape(str(self.folder))}</p>"
        return (
            f'<iframe srcdoc="{html.escape(page)}" title="{html.escape(str(self.folder))}" '
            f'style="width:100%;height:{PAGE_HEIGHT}px;border:0"></iframe>'
        )


class Result(_Folder):
    """A run.

    Attributes:
        folder: its files (docs/files.md).

    Raises:
        KvarenaError: the folder holds no run, or a file is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._files: RunFiles = _reading(read_run)(self.folder)

    @property
    def name(self) -> str:
        """How reports call it: allocator x scheduler."""
        return str(self.manifest["name"])

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json: the config, the machine, the code, the pool."""
        return self._files.manifest

    @cached_property
    def summary(self) -> RunSummary:
        """summary.json: every number of the report."""
        return self._typed(RunSummary)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request: the columns of requests.parquet and the latencies `ttft`, `tpot`, `e2e`, `queue_time`
        (seconds) and `normalized_latency` (seconds per token), NaN where a request has none.
        """
        frame = self._read(REQUESTS_FILE, "driver.record=full or summary")
        latencies = request_latencies(self._files)
        for name, key in LATENCIES.items():
            frame[name] = latencies[key]
            frame.attrs["units"][name] = "s/token" if key.endswith("per_token") else "s"
            frame.attrs["meanings"][name] = DEFINITIONS[key][1]
        return frame

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per engine step: the columns of steps.parquet."""
        return self._read(STEPS_FILE, "driver.record=full or summary")

    @cached_property
    def kv_map(self) -> pd.DataFrame:
        """One row per snapshot of who owns each block: the columns of kv_map.parquet."""
        return self._read(KV_MAP_FILE, "driver.record=full and report.kv_map=true, on an engine of this process")

    @cached_property
    def reuse(self) -> pd.DataFrame:
        """One row per stretch of a prompt that was asked of the prefix cache: the columns of reuse.parquet."""
        return self._read(REUSE_FILE, "driver.record=full or summary and an allocator with a prefix cache")

    def _read(self, name: str, needs: str) -> pd.DataFrame:
        """A Parquet file; units and meanings of its columns in `DataFrame.attrs`."""
        path = self.folder / name
        if not path.exists():
            raise KvarenaError(f"{self.folder} has no {name}; run it with {needs}")
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise KvarenaError(f"{path} cannot be read ({reason}); run the job again") from None
        version = int((table.schema.metadata or {}).get(VERSION_KEY, SCHEMA_VERSION))
        if version > SCHEMA_VERSION:
            raise KvarenaError(f"{path} has schema {version}, and this kvarena knows {SCHEMA_VERSION}; use a newer one")
        frame = table.to_pandas()
        described = {field.name: field.metadata or {} for field in table.schema}
        for key, word in (("units", b"unit"), ("meanings", b"meaning")):
            frame.attrs[key] = {column: of[word].decode() for column, of in described.items() if word in of}
        return frame


class _Runs(_Folder):
    """Several runs below one folder; their frames end to end, with what tells them apart in front."""

    results: list[Result]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    @cached_property
    def _keys(self) -> list[dict[str, Any]]:
        """Columns in front of each run's: its folder, and the settings in which the runs differ."""
        settings = differing_settings([result.manifest for result in self.results])
        rounds = [result.manifest.get("round") for result in self.results]
        return [
            {"run": result.folder.name} | ({"round": at} if set(rounds) != {None} else {}) | own
            for result, at, own in zip(self.results, rounds, settings, strict=True)
        ]

    def _long(self, name: str) -> pd.DataFrame:
        frames = [
            _with_keys(getattr(result, name), keys) for result, keys in zip(self.results, self._keys, strict=True)
        ]
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """The requests of all runs: one row per request and run, as `Result.requests`."""
        return self._long("requests")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The steps of all runs, as `Result.steps`."""
        return self._long("steps")

    @cached_property
    def kv_map(self) -> pd.DataFrame:
        """The snapshots of all runs, as `Result.kv_map`."""
        return self._long("kv_map")

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: its settings and every number of its summary, nested ones as `ttft_seconds_p50`."""
        rows = [flatten(result._summary, separator="_") for result in self.results]
        return pd.DataFrame([keys | row for keys, row in zip(self._keys, rows, strict=True)])


class Comparison(_Runs):
    """A sweep and its comparison.

    Attributes:
        folder: the sweep's.
        results: its runs, in the grid's order.
        failed: name, folder and error of the cells that failed.
        not_defined: the same of those whose settings mean nothing together.

    Raises:
        KvarenaError: the folder holds no sweep, or a run is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        sweep = _reading(read_json)(self.folder / SWEEP_FILE, SWEEP, "run the sweep again")
        self.results = [Result(self.folder / name) for name in sweep["runs"]]
        self.failed: list[dict[str, Any]] = sweep.get("failed") or []
        self.not_defined: list[dict[str, Any]] = sweep.get("not_defined") or []

    @cached_property
    def summary(self) -> ComparisonSummary:
        """summary.json of the comparison: cells over their repeats, verdicts, costs."""
        return self._typed(ComparisonSummary)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """One row per cell, its repeats folded: label, settings and numbers, nested ones as `ttft_seconds_p50`."""
        rows = [
            {"label": cell["label"]} | cell["settings"] | flatten(cell, separator="_")
            for cell in self._summary["cells"]
        ]
        return pd.DataFrame(rows).drop(columns="settings", errors="ignore")


class Experiment(_Runs):
    """A study of several cells and its report (`experiment=NAME`).

    Attributes:
        folder: the study's.
        results: its cells, in the order in which they ran.

    Raises:
        KvarenaError: the folder holds no study, or a cell is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        study = _reading(read_json)(self.folder / STUDY_FILE, {"cells": [str]}, "run the experiment again")
        self.results = [Result(self.folder / name) for name in study["cells"]]

    @cached_property
    def summary(self) -> ExperimentSummary:
        """summary.json of the study: its claims, and how many of them hold."""
        return self._typed(ExperimentSummary)


def load(folder: str | Path) -> Result | Comparison | Experiment:
    """What a run, a sweep or an experiment left in its folder.

    Raises:
        KvarenaError: it holds none of these, or a file is missing or broken.
    """
    kinds: Sequence[tuple[str, type[Result | Comparison | Experiment]]] = (
        (MANIFEST_FILE, Result), (SWEEP_FILE, Comparison), (STUDY_FILE, Experiment),
    )  # fmt: skip
    for name, kind in kinds:
        if (Path(folder) / name).is_file():
            return kind(folder)
    what = "holds no run, sweep or experiment" if Path(folder).is_dir() else "is no folder"
    raise KvarenaError(f"{folder} {what}; give the folder that was printed at its end (outputs/... or multirun/...)")


def _with_keys(frame: pd.DataFrame, keys: Mapping[str, Any]) -> pd.DataFrame:
    """`frame` with constant columns in front."""
    front = {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in keys.items()}
    made = pd.concat([pd.DataFrame(front, index=frame.index), frame], axis=1)
    made.attrs = frame.attrs
    return made
