"""The config as an object, for benchmarks, tests and the console command: what run.py would be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def load_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose conf/config.yaml with `overrides`, each as on run.py's command line.

    Raises:
        hydra.errors.HydraException: an unknown key or group option.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=list(overrides))
