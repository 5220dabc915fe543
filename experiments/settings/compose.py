"""The config as an object, for benchmarks, tests and the console command: what run.py would be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig, open_dict

from kvarena.experiments.settings import defaults
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.outside import offer_installed

defaults.register()
CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


# The config groups whose chosen options name a cell in reports.
NAMING_GROUPS = ("allocator", "scheduler", "router", "workload", "arrival")


def named_choices(choices: Mapping[str, Any]) -> dict[str, str]:
    """Of all groups' chosen options those that name a cell; without a router there is none of it."""
    return {group: str(choices[group]) for group in NAMING_GROUPS if (group, choices[group]) != ("router", "none")}


def load_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose conf/config.yaml with `overrides`, each as on run.py's command line.

    Raises:
        hydra.errors.HydraException: an unknown key or group option.
    """
    return _compose(overrides, with_hydra=False)


def load_run(overrides: Sequence[str] = ()) -> RunConfig:
    """The same, typed. Raises ConfigError where a value is out of range."""
    return RunConfig.of(load_config(overrides))


def compose_cell(overrides: Sequence[str]) -> tuple[RunConfig, dict[str, str]]:
    """A cell's config, and what the groups that name it were set to. Raises as `load_run`."""
    cfg = _compose(overrides, with_hydra=True)
    choices = named_choices(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return RunConfig.of(cfg), choices


def _compose(overrides: Sequence[str], *, with_hydra: bool) -> DictConfig:
    # A job that runs under Hydra composes configs of its own: what Hydra keeps for that job stays as it is.
    offer_installed(overrides)
    current = GlobalHydra.instance()
    kept, job = current.hydra, JobRuntime.instance().get("name")
    current.clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = kept
        JobRuntime.instance().set("name", job)
