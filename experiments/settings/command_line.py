"""The command that makes a run, a sweep or an experiment again, as words, for its manifest and its report's page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from kvarena.experiments.settings.compose import CONF_DIR

RUN = ("python", "run.py")
PROGRAMS = {  # by what was started, its folder where that tells; all of them read the same overrides
    "kvarena": ("kvarena", "run"),
    "kvarena/__main__.py": ("python", "-m", "kvarena", "run"),
}
MODE = "hydra.mode="  # Hydra's own word for -m


def program_of(started: Path, other: tuple[str, ...]) -> tuple[str, ...]:
    """The words that start what was started so; `other` where it is none of the `kvarena` commands."""
    return next((PROGRAMS[name] for name in (started.name, "/".join(started.parts[-2:])) if name in PROGRAMS), other)


def command_of(hydra: Any, *, alone: bool = False) -> list[str]:
    """The words of the command that runs a job or a sweep, without a shell's quotes.

    Args:
        hydra: the node of that name, of the job or the sweep.
        alone: of a sweep's cell: what runs it without the sweep, into a folder of its own.
    """
    words = [*program_of(Path(sys.argv[0]), RUN), *_config_options(hydra)]
    task, own = list(hydra.overrides.task), list(hydra.overrides.hydra)
    if alone:
        return [*words, *without_sweep(task)]
    if hydra.mode is RunMode.MULTIRUN:
        words.append("-m")
    return [*words, *task, *(word for word in own if not word.startswith(MODE))]


def without_sweep(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what a cell runs, not how its sweep goes about it."""
    return [word for word in overrides if not word.lstrip("+~").startswith("sweep.")]


def _config_options(hydra: Any) -> list[str]:
    """Hydra's options for a config of another name or place."""
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    main, name = sources.get("main"), str(hydra.job.config_name)
    words = [] if main is None or Path(main) == Path(CONF_DIR) else ["--config-path", main]
    words += ["--config-dir", sources["command-line"]] if "command-line" in sources else []
    return words + ([] if name.removesuffix(".yaml") == "config" else ["--config-name", name])
