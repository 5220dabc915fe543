"""The config is typed once, at the door; behind it nobody sees Hydra's, and finished cells keep their keys."""

import pickle
from dataclasses import fields

import pytest
from omegaconf import OmegaConf
from test_import_rule import MODULES

from kvarena.engine.checks import Section, check_int
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.folders.cell_state import cell_key, key_of
from kvarena.experiments.settings.compose import CONF_DIR, compose_cell, load_config
from kvarena.experiments.settings.config import KINDS, RunConfig, RunnerConfig, SimulatedRunnerConfig

# Who composes a config, writes it as Hydra composed it, or is called by Hydra.
DOOR = {
    "experiments.entry", "experiments.folders.run_folder", "experiments.settings.compose",
    "experiments.settings.config", "experiments.settings.defaults", "experiments.sweeps.ray_cells",
    "experiments.sweeps.ray_launcher", "experiments.sweeps.sweep", "experiments.sweeps.sweep_plan",
    "experiments.sweeps.sweeper",
}  # fmt: skip
CHOICES = {"allocator": "paged", "scheduler": "continuous"}


def test_nobody_behind_the_door_sees_a_config_of_hydra():
    users = {name.removeprefix("kvarena.") for name, path in MODULES.items() if "DictConfig" in path.read_text()}
    assert users == DOOR


def test_the_key_of_a_recorded_cell():
    """Recorded from another code; where it changes, no finished cell is found again."""
    values = {
        "sweep": {"round": None}, "report": {"pages": True},
        "workload": {"_target_": "kvarena.experiments.workloads.synthetic.FixedWorkload", "seed": 3, "prompt_len": 8},
        "engine": {"overlap": False, "max_model_len": None}, "kv_cache": {"num_slots": 16384, "memory_gib": 0.5},
        "mode": "run", "target": None,
    }  # fmt: skip
    key = key_of(values, CHOICES)
    assert (key["config"], key["round"]) == ("649ff87948d1be5c4f30885d", None)
    assert key_of(values | {"sweep": {"round": 2}, "server": {"port": 1}}, CHOICES)["config"] == key["config"]
    assert key_of(values | {"mode": "serve"}, CHOICES)["config"] != key["config"]


@pytest.mark.parametrize("overrides", [[], ["runner=simulated", "kv_cache.num_blocks=4"], ["experiment=capacity"]])
def test_a_run_keeps_its_values_as_they_were_composed(overrides):
    composed = load_config(overrides)
    run = RunConfig.of(composed)
    assert run.values == OmegaConf.to_container(composed, resolve=True)
    assert list(run.values) == list(composed)
    assert pickle.loads(pickle.dumps(run)) == run  # for the engine's process
    assert cell_key(*compose_cell(overrides))["config"] == cell_key(run, compose_cell(overrides)[1])["config"]


@pytest.mark.parametrize("size", ["num_slots=64", "num_blocks=4", "memory_gib=2"])
def test_whatever_sizes_the_pool_leaves_the_level_below_it(size):
    """A size in place of the default one made a section of its own, without the other keys."""
    run = RunConfig.of(load_config([f"kv_cache.{size}", "kv_cache.host_gib=3", "kv_cache.load=never"])).kv_cache
    assert (run.sized_by, run.host_gib, run.load) == (f"kv_cache.{size.partition('=')[0]}", 3, "never")


def _settings() -> list[tuple[type[Section], str]]:
    kinds = [*KINDS.values(), RunnerConfig, SimulatedRunnerConfig, ServerConfig]
    return [(kind, one.name) for kind in kinds for one in fields(kind) if "Annotated" in str(one.type)]


@pytest.mark.parametrize(("kind", "name"), _settings(), ids=lambda one: getattr(one, "section", one))
def test_every_setting_is_checked_and_named(kind, name):
    good = {} if kind is ServerConfig else RunConfig.of(load_config(
        ["runner=simulated"] if kind is SimulatedRunnerConfig else []
    )).values[kind.section]  # fmt: skip
    kind(**good)
    for wrong in (["*"], {"a": 1}):
        if (name, type(wrong)) == ("shape", dict):
            continue
        with pytest.raises(ConfigError) as caught:
            kind(**good | {name: wrong})
        assert str(caught.value).startswith(f"{kind.section}.{name}={wrong} must be ")
        assert "\n" not in str(caught.value)


def test_a_number_given_as_text_is_shown_as_text():
    for value, shown in (("4", "'4'"), ("", "''"), ("four", "four"), (None, "None"), (True, "True"), (0, "0")):
        with pytest.raises(ConfigError, match=rf"^a\.b={shown} must be an integer in \[1, 8\]$"):
            check_int("a.b", value, 1, 8)
    assert check_int("a.b", 8, 1, 8) == 8


def test_what_others_than_its_class_read_of_a_strategy_must_be_there():
    run = RunConfig.of(load_config(["~scheduler.max_num_seqs"]))
    with pytest.raises(ConfigError, match=r"^scheduler\.max_num_seqs is needed"):
        run.scheduler.need("max_num_seqs")


def test_an_option_without_a_default_is_asked_for():
    with pytest.raises(ConfigError, match=r"^workload\.path has no default; give it a value$"):
        OmegaConf.update(config := load_config(), "workload.path", "???", force_add=True)
        RunConfig.of(config)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
def test_every_model_has_all_settings_of_a_model(name):
    config, _ = compose_cell([f"model={name}", *(["model.path=x"] if name == "path" else [])])
    assert config.model.quantization is None
