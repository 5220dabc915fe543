"""An option that schedulers share has one default, so that a sweep over them compares policies and not budgets."""

from __future__ import annotations

import inspect

import pytest
from hydra.utils import get_class
from scheduler_simulation import request, simulate

from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.strategies import strategy_names, strategy_options
from kvarena.schedulers.lifecycle import Lifecycle

SHARED = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_num_batched_tiles": 16, "watermark": 0.01}
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Lifecycle).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_conf_and_class_state_the_same_defaults(scheduler):
    """`chunked` had a token budget of 512 beside 2,048 of `continuous`: half of a sweep's ratio was the budget's."""
    options = strategy_options("scheduler", scheduler)
    own = {name: parameter for kind in reversed(get_class(options.pop("_target_")).__mro__[:-1])
           for name, parameter in inspect.signature(kind).parameters.items()}  # fmt: skip
    assert {name: options[name] for name in SHARED} == SHARED
    for name, value in options.items():
        default = own[name].default if name in own else DEFAULTS[name]
        assert value == default, f"conf/scheduler/{scheduler}.yaml: {name}={value}, and the class has {default}"


def test_the_server_sizes_chunks_by_what_steps_take():
    """Its budget is for moments in which nobody decodes."""
    scheduler = load_run(overrides_of(parse_flags(["models/demo"]))).scheduler
    assert (scheduler.need("chunks"), scheduler.need("max_num_batched_tokens")) == ("timed", 16384)
    run = load_run(["scheduler=chunked"]).scheduler
    assert (run.need("chunks"), run.need("max_num_batched_tokens")) == ("budget", 2048)
    whole = load_run(overrides_of(parse_flags(["models/demo", "--scheduler", "continuous"]))).scheduler
    assert whole.need("max_num_batched_tokens") == 2048


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (["--max-num-batched-tokens", "4K"], 4096),
        (["--max-num-seqs", "4000"], 16384),
        (["--max-num-seqs", "20000"], 20000),
        (["--max-num-seqs", "4000", "--scheduler", "static"], 4000),
    ],
)
def test_a_server_s_budget_is_as_given_and_holds_all_that_run(flags, budget):
    config = load_run(overrides_of(parse_flags(["models/demo", *flags])))
    assert config.scheduler.need("max_num_batched_tokens") == budget


def test_a_server_s_other_defaults():
    assert not any(made.startswith("scheduler.max_num_seqs") for made in overrides_of(parse_flags(["some/model"])))


@pytest.mark.parametrize(("watermark", "most_owned"), [(0.1, 40), (0.0, 60)])
def test_static_keeps_the_watermark_free_as_the_others_do(watermark, most_owned):
    load = [request(f"r{i}", 10, 10) for i in range(8)]  # 5 blocks of 4 each, for life: three leave 4 of 64 slots
    run = simulate("static", num_blocks=16, watermark=watermark, max_wait=0.0).run(load)
    assert max(step.usage.owned for step in run.steps) == most_owned
