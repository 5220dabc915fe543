"""Names of a comparison's cells, which runs repeat each other, and whom each is compared with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvarena.reports.comparing.cells import Cell, differing_settings, is_seed
from kvarena.reports.comparing.paired import same_prompts
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import RunFiles

MAX_REASONS = 3  # settings that say why a cell is not paired


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
    _number(cells)
    _label(cells)
    base = _find(cells, baseline)
    for cell in cells:
        cell.baseline, cell.unpaired = _baseline_of(cell, base, cells)
    return cells


def _number(cells: list[Cell]) -> None:
    """Find copies, and number the runs that are alike in everything by the time at which they began."""
    first: dict[tuple[str, bytes], Cell] = {}
    alike: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        original = first.setdefault(_content(cell), cell)
        if original is not cell:
            cell.copy_of = original
        else:
            alike.setdefault((cell.contender, cell.seeds, cell.round), []).append(cell)
    for runs in alike.values():
        for occurrence, cell in enumerate(sorted(runs, key=lambda run: run.start or 0.0)):
            cell.occurrence = occurrence
    for cell in cells:
        if cell.copy_of is not None:
            cell.occurrence = cell.copy_of.occurrence


def _content(cell: Cell) -> tuple[str, bytes]:
    return json.dumps(cell.run.manifest, sort_keys=True), cell.run.steps["end_time"].tobytes()


def _label(cells: list[Cell]) -> None:
    """allocator × scheduler, then what else differs; the folder where that is not enough.

    Where a cell has repeats no label names a seed or a round; the names of the runs do.
    """
    contenders = Counter(cell.contender for cell in cells)
    has_repeats = max(contenders.values()) > 1
    has_rounds = len({cell.round for cell in cells}) > 1
    for cell in cells:
        cell.label = cell.named(lambda key: not (has_repeats and is_seed(key)))
        cell.run_label = cell.named(lambda _: True) + (f", round={cell.round}" if has_rounds else "")
    owners: dict[str, dict[tuple[Any, ...], str]] = {}  # label -> contender -> its first folder
    for cell in cells:
        owners.setdefault(cell.label, {}).setdefault(cell.contender, cell.folder)
    taken: Counter[str] = Counter()
    final: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        if cell.contender not in final:
            rivals = owners[cell.label]
            name = cell.label if len(rivals) == 1 else f"{cell.label} [{rivals[cell.contender]}]"
            taken[name] += 1  # one folder given again
            final[cell.contender] = name if taken[name] == 1 else f"{name} ({taken[name]})"
    for cell in cells:
        cell.label = final[cell.contender]
    names = Counter(cell.run_label for cell in cells)
    for cell in cells:
        if not has_repeats:
            cell.run_label = cell.label
        elif names[cell.run_label] > 1:
            cell.run_label = f"{cell.run_label} [{cell.folder}]"


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
        rivals = [other for other in cells if other.contender == base.contender]
        candidates = [other for other in rivals if other.block == cell.block] or [base]
    else:
        rivals = [other for other in cells if other.strategy == base.strategy]
        candidates = [other for other in rivals if other.conditions == cell.conditions and other.block == cell.block]
        candidates.sort(key=lambda other: other.shared_code != cell.shared_code)
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
    if not keys:
        which = "repeat" if cell.round is None else f"round {cell.round}"
        return f"the baseline has no run of its {which}"
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
    return [(cell.copy_of.label, cell.label) for cell in cells if cell.copy_of is not None]
