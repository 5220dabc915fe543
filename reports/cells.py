"""The cells of a comparison: in which settings they differ, their names, and whom each is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.errors import ReportError
from reports.files import RunFiles
from reports.paired import same_prompts

STRATEGY = ("allocator", "scheduler")
# Config groups, and where the manifest says which option of the group ran.
GROUPS = {
    "allocator": ("strategy", "allocator"),
    "scheduler": ("strategy", "scheduler"),
    "model": ("model", "name"),
    "workload": ("workload", "name"),
    "arrival": ("arrival", "name"),
}
# Settings that cannot change what ran, and those of a server, which stands in the place of a strategy's name.
IGNORED = ("hydra", "report", "name", "slo", "target", "http")

MAX_REASONS = 3  # settings that say why a cell is not paired


@dataclass(slots=True, eq=False)  # of two runs alike, each is still its own
class Cell:
    """One run of a comparison.

    Attributes:
        folder: its folder, as the sweep names it.
        run: its files.
        summary: its summary.
        settings: the settings that differ between the cells, and allocator and scheduler always.
        label: how figures and tables call it.
        baseline: the cell it is compared with; None when there is none with the same workload, itself for the baseline.
        unpaired: why there is none; None where there is one.
    """

    folder: str
    run: RunFiles
    summary: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    baseline: Cell | None = None
    unpaired: str | None = None

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
        """The other settings that differ: workload, rate, pool, ..."""
        return {key: value for key, value in self.settings.items() if key.split(".")[0] not in STRATEGY}


def is_seed(key: str) -> bool:
    """Whether a setting is a seed: cells that differ in it alone are repeats."""
    return key.rsplit(".", 1)[-1] == "seed"


def make_cells(runs: Sequence[tuple[str, RunFiles, dict[str, Any]]], baseline: str | None) -> list[Cell]:
    """Name the runs of a comparison and choose each one's baseline.

    Args:
        runs: (folder, files, summary) of each.
        baseline: folder, name or label of the run that others are compared with; None takes the first.

    Raises:
        ReportError: there is no run, or none called `baseline`.
    """
    if not runs:
        raise ReportError("nothing to compare: no run of the sweep has finished")
    cells = [Cell(folder, run, summary) for folder, run, summary in runs]
    settings = differing_settings([cell.run.manifest for cell in cells])
    for cell, values in zip(cells, settings, strict=True):
        cell.settings = values
    _label(cells)
    base = _find(cells, baseline)
    for cell in cells:
        cell.baseline, cell.unpaired = _baseline_of(cell, base, cells)
    return cells


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
        if group in STRATEGY or len(set(map(str, names))) > 1:
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


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by keys with dots."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _label(cells: list[Cell]) -> None:
    """allocator × scheduler, then what else differs; the folder where that is not enough."""
    for cell in cells:
        rest = [
            f"{key.rsplit('.', 1)[-1]}={value}"
            for key, value in cell.settings.items()
            if key not in STRATEGY and value is not None
        ]
        cell.label = ", ".join([f"{cell.settings['allocator']} × {cell.settings['scheduler']}", *rest])
    labels = [cell.label for cell in cells]
    for cell in cells:
        if labels.count(cell.label) > 1:
            cell.label = f"{cell.label} [{cell.folder}]"
    given = [cell.label for cell in cells]
    for index, cell in enumerate(cells):
        if earlier := given[:index].count(cell.label):  # one folder given again
            cell.label = f"{cell.label} ({earlier + 1})"


def _plain(name: str) -> str:
    return "".join(name.replace("×", "x").split()).lower()


def _find(cells: list[Cell], baseline: str | None) -> Cell:
    if baseline is None:
        return cells[0]
    for cell in cells:
        names = (cell.folder, str(cell.run.manifest["name"]), cell.label)
        if _plain(baseline) in map(_plain, names):
            return cell
    known = ", ".join(repr(cell.label) for cell in cells)
    raise ReportError(f"there is no run called {baseline!r} to compare with; the runs are {known}")


def _baseline_of(cell: Cell, base: Cell, cells: list[Cell]) -> tuple[Cell | None, str | None]:
    """The baseline's strategy under the cell's conditions; the baseline itself where only conditions differ.

    Where there is none, or none with the same prompts, the second says why.
    """
    if len({other.strategy for other in cells}) == 1:
        candidates = [base]
    else:
        rivals = [other for other in cells if other.strategy == base.strategy]
        candidates = [other for other in rivals if other.conditions == cell.conditions]
        if cell in candidates:
            return cell, None
        if not candidates:
            return None, _no_rival(cell, rivals)
    for candidate in candidates:
        if candidate is cell or same_prompts(cell.run, candidate.run):
            return candidate, None
    return None, f"{_other_prompts(cell, candidates[0])}{_two_clocks(cell, candidates[0])}"


def _no_rival(cell: Cell, rivals: list[Cell]) -> str:
    """Why no run of the baseline's strategy is like the cell: where the nearest one differs."""

    def differing(other: Cell) -> list[str]:
        return [key for key, value in cell.conditions.items() if other.conditions[key] != value]

    nearest = min(rivals, key=lambda other: len(differing(other)))
    keys = differing(nearest)
    where = ", ".join(f"{key}={nearest.conditions[key]} and not {cell.conditions[key]}" for key in keys[:MAX_REASONS])
    more = f" and {len(keys) - MAX_REASONS} more settings" if len(keys) > MAX_REASONS else ""
    reason = f"no run of the baseline's strategy has its settings ({nearest.label} has {where}{more})"
    return reason + _two_clocks(cell, nearest)


def _two_clocks(cell: Cell, other: Cell) -> str:
    return "" if cell.is_simulated == other.is_simulated else "; one of them is simulated, the other is measured"


def _other_prompts(cell: Cell, other: Cell) -> str:
    for one in (cell, other):
        if one.run.num_requests and not one.run.list_lengths("prompt_token_ids").any():
            return f"{'it' if one is cell else one.label} recorded no prompts (driver.record=summary)"
    return f"its requests are not those of {other.label}"


def same_runs(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Labels of cells that are one run, each with the first such: the same folder, or a copy."""
    first: dict[tuple[str, bytes], Cell] = {}
    pairs = []
    for cell in cells:
        key = (json.dumps(cell.run.manifest, sort_keys=True), cell.run.steps["end_time"].tobytes())
        if first.setdefault(key, cell) is not cell:
            pairs.append((first[key].label, cell.label))
    return pairs
