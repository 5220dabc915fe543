"""The cells of a comparison, and in which settings they differ."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kvarena.reports.analysis.latency import request_latencies
from kvarena.reports.reading.files import RunFiles
from kvarena.reports.reading.names import cell_name

STRATEGY = ("allocator", "scheduler", "router")
# Config groups, and where the manifest says which option of the group ran.
GROUPS = {
    "allocator": ("strategy", "allocator"),
    "scheduler": ("strategy", "scheduler"),
    "router": ("strategy", "router"),
    "model": ("model", "name"),
    "workload": ("workload", "name"),
    "arrival": ("arrival", "name"),
}
# Settings that cannot change what ran, and those of a server, which stands in the place of a strategy's name.
IGNORED = ("hydra", "report", "name", "slo", "target", "http", "sweep")


@dataclass(eq=False)  # of two runs alike, each is still its own
class Cell:
    """One run of a comparison.

    Attributes:
        folder: its folder, as the sweep names it.
        run: its files.
        summary: its summary.
        settings: the settings that differ between the cells, and allocator and scheduler always.
        label: how figures and tables call it; its repeats have the same.
        run_label: its own name.
        occurrence: how many runs alike, of no round or of the same, began before it.
        copy_of: the cell whose run it is too.
        baseline: the cell it is compared with; None when there is none with the same workload, itself for the baseline.
        unpaired: why there is none; None where there is one.
    """

    folder: str
    run: RunFiles
    summary: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    run_label: str = ""
    occurrence: int = 0
    copy_of: Cell | None = None
    baseline: Cell | None = None
    unpaired: str | None = None

    @cached_property
    def latencies(self) -> dict[str, np.ndarray]:
        """What `request_latencies` answers for its run."""
        return request_latencies(self.run)

    @property
    def round(self) -> int | None:
        """The round of a sweep in which it ran; None outside one."""
        return self.run.manifest.get("round")

    @property
    def seeds(self) -> tuple[tuple[str, str], ...]:
        """The seeds that differ between the cells, as text."""
        return tuple((key, repr(value)) for key, value in self.settings.items() if is_seed(key))

    @property
    def block(self) -> tuple[Any, ...]:
        """What a cell and the one that it is compared with have in common: seeds, round, occurrence."""
        return self.seeds, self.round, self.occurrence

    @cached_property
    def identity(self) -> str:
        """What ran it: only runs of the same code on the same machine are repeats."""
        manifest = self.run.manifest
        code = (manifest.get("sources") or {}).get("hash") or manifest["git"]
        clock, target = (manifest.get(key) or {} for key in ("simulation", "target"))
        engine = [clock.get("kind"), clock.get("profile"), target.get("url"), target.get("model")]
        return json.dumps([code, manifest["machine"], manifest["versions"], engine], sort_keys=True)

    @property
    def shared_code(self) -> str:
        """The code that it shares with runs of other strategies."""
        return json.dumps((self.run.manifest.get("sources") or {}).get("packages") or self.run.manifest["git"])

    @cached_property
    def start(self) -> float | None:
        """When it began, in seconds of the clock on the wall; None if its files do not say."""
        run, created = self.run.manifest["run"], self.run.manifest.get("created")
        try:
            if run.get("ended") and run.get("wall_time") is not None:
                return datetime.fromisoformat(run["ended"]).timestamp() - run["wall_time"]
            return datetime.fromisoformat(created).timestamp() if created else None
        except ValueError:
            return None

    @property
    def is_simulated(self) -> bool:
        """Whether its times are a virtual clock's."""
        return bool(self.run.manifest.get("simulation"))

    @property
    def is_baseline(self) -> bool:
        """True when the cell is compared with itself."""
        return self.baseline is self

    @property
    def strategy(self) -> tuple[str, ...]:
        """The settings that make the strategy, as text: allocator, scheduler, and their options that differ."""
        return tuple(repr(value) for key, value in self.settings.items() if key.split(".")[0] in STRATEGY)

    @property
    def conditions(self) -> dict[str, Any]:
        """The other settings that differ: workload, seed, rate, pool, ..."""
        return {key: value for key, value in self.settings.items() if key.split(".")[0] not in STRATEGY}

    def named(self, wanted: Callable[[str], bool]) -> str:
        """Its strategy, and of the settings that differ those whose keys are wanted."""
        rest = [
            f"{key.rsplit('.', 1)[-1]}={value}"
            for key, value in self.settings.items()
            if key not in STRATEGY and value is not None and wanted(key)
        ]
        allocator, scheduler, router = map(self.settings.get, STRATEGY)
        return ", ".join([cell_name(str(allocator), str(scheduler), router, sign="×"), *rest])

    @property
    def contender(self) -> tuple[Any, ...]:
        """What its repeats share: the settings but the seeds, what ran it, and that it is no copy."""
        settings = tuple((key, repr(value)) for key, value in self.settings.items() if not is_seed(key))
        return settings, self.identity, None if self.copy_of is None else id(self)


def page_of(folder: Path, seen_from: Path) -> str | None:
    """Where a run's own page is, as a relative URL of a page in another folder; None where it has none."""
    page = folder / "report.html"
    return quote(os.path.relpath(page.resolve(), seen_from.resolve())) if page.exists() else None


def is_seed(key: str) -> bool:
    """Whether a setting is a seed: cells that differ in it alone are repeats."""
    return key.rsplit(".", 1)[-1] == "seed"


def differing_settings(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings in which the runs differ, per run; allocator and scheduler come first and are always there.

    An option of a config group (`allocator.block_size`) counts only if it differs between runs of the same choice of
    that group: that paged has a block size and contiguous has a reservation is no difference beside their names.
    """
    flats = [flatten(manifest.get("config") or {}) for manifest in manifests]
    choices = {
        group: [(manifest.get(part) or {}).get(name) for manifest in manifests]
        for group, (part, name) in GROUPS.items()
    }
    result: list[dict[str, Any]] = [{} for _ in manifests]
    for group, names in choices.items():
        if group in STRATEGY[:2] or len(set(map(str, names))) > 1:
            for settings, name in zip(result, names, strict=True):
                settings[group] = name
    keys = sorted({key for flat in flats for key in flat})
    for key in keys:
        group = key.split(".")[0]
        if group in IGNORED or key.endswith("_target_"):
            continue
        values: dict[Any, set[str]] = {}
        for index, flat in enumerate(flats):
            if manifests[index].get("target") and key not in flat:
                continue  # a server's engine has settings of its own, which nobody here knows
            choice = str(choices[group][index]) if group in choices else ""
            values.setdefault(choice, set()).add(repr(flat.get(key)))
        if any(len(seen) > 1 for seen in values.values()):
            for settings, flat in zip(result, flats, strict=True):
                settings[key] = flat.get(key)
    return result


def flatten(nested: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """A nested mapping by its keys, joined; lists are left as they are."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{separator}{key}" if prefix else str(key), separator)
    return flat
