"""What a run's manifest says of where its result comes from: strategy, config, code, machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvarena.experiments.folders.cell_state import measured_config
from kvarena.experiments.folders.provenance import git_state, machine, utc_now, versions
from kvarena.experiments.folders.sources import sources_of
from kvarena.experiments.settings.config import RunConfig

SCHEMA_VERSION = 1


def manifest_of(
    config: RunConfig, name: str, choices: Mapping[str, str], command: Sequence[str] | None
) -> dict[str, Any]:
    """What the manifest says of a run before it begins.

    Args:
        config: of the run.
        name: how it is called in reports.
        choices: the config groups' chosen options (`allocator`, `scheduler`, `arrival`, perhaps `router`).
        command: the words that run it again; None where nobody knows them.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": utc_now("seconds"),
        "strategy": {
            "allocator": choices["allocator"],
            "scheduler": choices["scheduler"],
            "details": config.allocator.settings | config.scheduler.settings,
        }
        | ({} if config.router is None else {"router": choices["router"], "routing": config.router.settings}),
        "arrival": {"name": choices["arrival"]} | config.arrival.settings,
        "config": config.values,
        "round": config.sweep.round,
        "command": None if command is None else list(command),
        "git": git_state(),
        "sources": sources_of(measured_config(config.values)) | git_state(),
        "machine": machine(),
        "versions": versions(),
    }
