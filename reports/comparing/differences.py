"""Where cells differ though nobody chose it: differences that a headline would credit to a strategy.

What was swept, or differs between runs of one strategy, is a column of the grid and part of the labels. The rest is
found here: options that strategies share by name and whose defaults differ, pools of other sizes, and what ran the
cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarena.reports.comparing.cells import STRATEGY, Cell, flatten
from kvarena.reports.drawing.format import DASH, count

# Options that make a strategy what its name says.
DEFINING = ("_target_", "reservation", "placement", "retire")
WORDS = {
    "scheduler.max_num_batched_tokens": "token budget",
    "scheduler.max_num_seqs": "most running requests",
    "allocator.block_size": "block size",
}
MAX_NAMES = 3  # of the cells of one value


def hidden_differences(cells: Sequence[Cell]) -> list[str]:
    """A sentence for the options, and one for each part of what ran the cells; none where nothing differs.

    Args:
        cells: of a comparison, labelled. A server's engine is not known here, so such cells are let be.
    """
    here = [cell for cell in cells if not cell.run.manifest.get("target")]
    lines = []
    if options := [f"{name} {apart}" for name, apart in _options(here) if apart]:
        lines.append(f"Not swept, and yet different, so that a ratio is theirs too: {'; '.join(options)}.")
    lines += [f"{name} differs: {apart}." for name, apart in _machinery(here) if apart]
    return lines


def _options(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Options of the strategies, and the pool, that differ outside the grid's columns."""
    swept = {key for cell in cells for key in cell.settings}
    flats = [flatten(cell.run.manifest.get("config") or {}) for cell in cells]
    result = []
    for key in sorted({key for flat in flats for key in flat if key.split(".")[0] in STRATEGY}):
        group, _, option = key.partition(".")
        if key in swept or option in DEFINING:
            continue
        having = [(cell, flat[key]) for cell, flat in zip(cells, flats, strict=True) if key in flat]
        result.append(
            (WORDS.get(key, option), apart([(str(cell.settings.get(group)), value) for cell, value in having]))
        )
    if not any(key.startswith("kv_cache.") for key in swept):
        slots = [(str(cell.settings["allocator"]), cell.run.manifest["pool"].get("num_slots")) for cell in cells]
        result.append(("slots of the KV pool", apart(slots)))
    return result


def _machinery(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Model, runner, machine, software and code, where they differ and no column says so."""
    swept = {key.split(".")[0] for cell in cells for key in cell.settings}
    manifests = [(cell.label, cell.run.manifest) for cell in cells]
    measured = [(cell.label, cell.run.manifest) for cell in cells if not cell.is_simulated]
    result = []
    if not swept & {"model", "engine"}:
        result.append(("The model", apart([(label, _model(manifest)) for label, manifest in manifests])))
    if "runner" not in swept:
        result += _parts("The runner", [(label, _runner(manifest)) for label, manifest in measured])
    if "engine" not in swept:
        result.append(("The step loop", apart([(label, _loop(manifest)) for label, manifest in manifests])))
    result.append(("The machine", apart([(label, machine_name(manifest["machine"])) for label, manifest in measured])))
    result += _parts("The software", [(label, manifest["versions"]) for label, manifest in manifests])
    result.append(("The code", _code(manifests)))
    return result


def _parts(title: str, cells: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Key by key what differs in a mapping that each cell has."""
    keys = sorted({key for _, values in cells for key in values})
    return [(f"{title} ({key})", apart([(label, values.get(key)) for label, values in cells])) for key in keys]


def apart(values: Sequence[tuple[str, Any]]) -> str:
    """Who has which value: `2,048 (continuous, static), 512 (chunked)`; empty where all have the same.

    Args:
        values: (who, value).
    """
    by_value: dict[str, list[str]] = {}
    for name, value in values:
        names = by_value.setdefault(_text(value), [])
        if name not in names:
            names.append(name)
    if len(by_value) < 2:
        return ""
    return ", ".join(f"{value} ({_names(names)})" for value, names in by_value.items())


def _names(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return "; ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _model(manifest: dict[str, Any]) -> str:
    model = manifest["model"]
    return f"{model.get('name') or DASH} in {model.get('dtype') or DASH}"


def _loop(manifest: dict[str, Any]) -> str:
    """With or without overlap; older manifests have it among their settings alone."""
    found = manifest.get("engine") or (manifest.get("config") or {}).get("engine") or {}
    overlap = found.get("overlap")
    return DASH if overlap is None else "with overlap" if overlap else "without overlap"


def _runner(manifest: dict[str, Any]) -> dict[str, Any]:
    """What ran the steps; the kernels of attention have a notice of their own."""
    runner = (manifest.get("pool") or {}).get("runner")
    kernels = ("decode_kernel", "prefill_kernel")
    return {key: value for key, value in runner.items() if key not in kernels} if isinstance(runner, dict) else {}


def machine_name(machine: dict[str, Any]) -> str:
    """Its GPUs, or its processor's cores."""
    if gpu := machine.get("gpu"):
        return f"{gpu['count']} x {gpu['name']}"
    return f"{machine.get('cores') or DASH} cores of {machine.get('cpu') or DASH}"


def _code(manifests: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Commits, where code that the cells share differs: by its content where every manifest holds that."""
    sources = [manifest.get("sources") for _, manifest in manifests]
    if all(isinstance(entry, dict) and entry.get("packages") for entry in sources):
        seen: dict[str, str] = {}
        files = [entry["packages"] | (entry.get("strategy") or {}) for entry in sources if entry]
        if all(seen.setdefault(name, digest) == digest for parts in files for name, digest in parts.items()):
            return ""
        commits = [(label, f"{_commit(manifest)}, sources {manifest['sources']['hash'][:8]}")
                   for label, manifest in manifests]  # fmt: skip
        return apart(commits)
    return apart([(label, _commit(manifest)) for label, manifest in manifests])


def _commit(manifest: dict[str, Any]) -> str:
    git = manifest["git"]
    return f"{(git.get('commit') or DASH)[:12]}{' with local changes' if git.get('dirty') else ''}"
