"""Synthetic and built-in workloads: exact ids, stated moments, one seed, limits that are counted."""

from dataclasses import replace

import numpy as np
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.distributions import LognormalLength
from kvarena.experiments.workloads.published import (
    AlpacaWorkload,
    AzureCodeWorkload,
    AzureConvWorkload,
    PublishedWorkload,
    ShareGPTWorkload,
)
from kvarena.experiments.workloads.synthetic import FixedWorkload, LognormalWorkload, UniformWorkload

RANGE = {"min": 8, "max": 64}


def uniform(**options):
    defaults = {"num_requests": 50, "seed": 0, "vocab_size": 300, "prompt_len": RANGE, "output_len": RANGE}
    return UniformWorkload(**(defaults | options))


def test_items_are_well_formed_and_reserved_ids_never_drawn():
    reserved = [0, 1, 2, 299, 5000]
    items = uniform(reserved_token_ids=reserved, vocab_size=300).items()
    assert len(items) == 50
    assert len({item.request_id for item in items}) == 50
    drawn = {token for item in items for token in item.prompt_token_ids}
    assert drawn <= set(range(300)) - set(reserved)
    assert len(drawn) > 250  # the vocabulary is used, not a corner of it
    assert all(type(token) is int for token in items[0].prompt_token_ids)
    assert all(8 <= len(item.prompt_token_ids) <= 64 and 8 <= item.output_len <= 64 for item in items)
    assert all(item.arrival_time is None for item in items)


def test_requests_are_of_clients_and_priorities_in_turn():
    plain, turned = uniform(num_requests=6).items(), uniform(num_requests=6, num_clients=4, num_priorities=3).items()
    assert [item.client_id for item in turned] == ["c0", "c1", "c2", "c3", "c0", "c1"]
    assert [item.priority for item in turned] == [0, 1, 2, 0, 1, 2]
    assert [item.prompt_token_ids for item in turned] == [item.prompt_token_ids for item in plain]
    assert {(item.client_id, item.priority) for item in plain} == {("", 0)}
    with pytest.raises(ConfigError, match=r"workload\.num_clients=-1 must be"):
        uniform(num_clients=-1)


def test_a_workload_that_names_its_clients_is_given_none():
    class Named(UniformWorkload):
        def _build(self):
            return replace(super()._build(), client_ids=["me"] * self.num_requests)

    options = {"num_requests": 2, "seed": 0, "vocab_size": 300, "prompt_len": RANGE, "output_len": RANGE}
    assert {item.client_id for item in Named(**options).items()} == {"me"}
    with pytest.raises(ConfigError, match=r"workload\.num_clients is for workloads that say none themselves"):
        Named(**options, num_clients=2).items()


def test_token_ids_are_uniform_over_the_vocabulary():
    items = FixedWorkload(num_requests=100, seed=3, vocab_size=50, prompt_len=500, output_len=1).items()
    counts = np.bincount([t for item in items for t in item.prompt_token_ids], minlength=50)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert 20 < chi2 < 95  # 49 degrees of freedom: mean 49, standard deviation 9.9


def test_same_seed_same_items_and_other_seed_other_items():
    assert uniform(seed=4).items() == uniform(seed=4).items()
    assert uniform(seed=4).items() != uniform(seed=5).items()


@pytest.mark.parametrize("kind", [ShareGPTWorkload, AzureConvWorkload])
def test_more_requests_extend_the_list(kind):
    short = kind(num_requests=40, seed=1, vocab_size=500, max_total_len=1200).items()
    long = kind(num_requests=90, seed=1, vocab_size=500, max_total_len=1200).items()
    assert long[:40] == short


def test_options_of_one_part_leave_the_others_alone():
    base = uniform()
    other = uniform(output_len={"min": 100, "max": 900})
    assert [i.prompt_token_ids for i in base.items()] == [i.prompt_token_ids for i in other.items()]
    longer = uniform(prompt_len={"min": 100, "max": 900})
    assert [i.output_len for i in base.items()] == [i.output_len for i in longer.items()]
    # The longer prompt of a row begins with the shorter one: content does not depend on lengths.
    assert all(
        b.prompt_token_ids == a.prompt_token_ids[: len(b.prompt_token_ids)]
        for a, b in zip(longer.items(), base.items(), strict=True)
    )


def test_light_mode_keeps_everything_but_the_tokens():
    full, light = uniform().items(), list(uniform().items_iter(with_token_ids=False))
    assert [(len(i.prompt_token_ids), i.output_len, i.request_id) for i in full] == [
        (len(i.prompt_token_ids), i.output_len, i.request_id) for i in light
    ]
    same = [i.prompt_token_ids for i in light if len(i.prompt_token_ids) == len(light[0].prompt_token_ids)]
    assert all(prompt is same[0] for prompt in same)


def test_uniform_moments():
    table = uniform(num_requests=20000, prompt_len={"min": 1, "max": 1000}).table
    assert table.prompt_lens.mean() == pytest.approx(500.5, abs=4 * 288.7 / 20000**0.5)
    assert table.prompt_lens.std() == pytest.approx(288.7, rel=0.02)
    assert (table.prompt_lens.min(), table.prompt_lens.max()) == (1, 1000)


@pytest.mark.parametrize(
    ("mean", "sigma", "low", "high"), [(256, 1.0, 4, 1024), (20, 0.5, 1, 4096), (600, 2.0, 1, 1024)]
)
def test_lognormal_has_the_mean_after_truncation(mean, sigma, low, high):
    draws = LognormalLength(mean, sigma, low, high).draw(np.random.default_rng(0), 100_000)
    assert draws.mean() == pytest.approx(mean, abs=4 * draws.std() / 100_000**0.5 + 0.05)
    assert draws.min() >= low
    assert draws.max() <= high


@pytest.mark.parametrize(
    ("kind", "prompt_mean", "output_mean"),
    [
        (ShareGPTWorkload, 161.31, 337.99),
        (AlpacaWorkload, 19.31, 58.45),
        (AzureConvWorkload, 1154.7, 211.1),
        (AzureCodeWorkload, 2047.8, 27.9),
    ],
)
def test_built_in_means(kind: type[PublishedWorkload], prompt_mean, output_mean):
    table = kind(num_requests=200_000, seed=0, vocab_size=10).table
    for lens, mean in ((table.prompt_lens, prompt_mean), (table.output_lens, output_mean)):
        assert lens.mean() == pytest.approx(mean, rel=0.02, abs=4 * lens.std() / 200_000**0.5)
        assert lens.min() >= 1


@pytest.mark.parametrize(
    ("kind", "prompt", "output"),
    [  # median, p90, p99, max as measured on the trace files
        (AzureConvWorkload, (1020, 2735, 4142, 14050), (129, 424, 601, 1000)),
        (AzureCodeWorkload, (1469, 5194, 7436, 7437), (13, 55, 252, 1899)),
    ],
)
def test_built_in_azure_quantiles(kind, prompt, output):
    table = kind(num_requests=100_000, seed=0, vocab_size=10).table
    for lens, facts in ((table.prompt_lens, prompt), (table.output_lens, output)):
        assert np.quantile(lens, [0.5, 0.9, 0.99]) == pytest.approx(facts[:3], rel=0.03)
        assert lens.max() <= facts[3]


def test_limits_drop_or_clip_and_say_so():
    options = {"num_requests": 500, "seed": 0, "vocab_size": 10, "max_total_len": 600, "max_prompt_len": 300}
    dropped = ShareGPTWorkload(**options)
    assert len(dropped.table) == 500
    assert (dropped.table.prompt_lens + dropped.table.output_lens).max() <= 600
    free = ShareGPTWorkload(num_requests=2000, seed=0, vocab_size=10).table
    fits = (free.prompt_lens <= 300) & (free.prompt_lens + free.output_lens <= 600)
    num_drawn = int(np.flatnonzero(fits)[499]) + 1
    assert f"dropped {num_drawn - 500} of {num_drawn}" in dropped.description
    assert (dropped.table.prompt_lens == free.prompt_lens[fits][:500]).all()
    clipped = ShareGPTWorkload(on_exceed="clip", **options)
    assert f"clipped {int((~fits[:500]).sum())} of 500" in clipped.description
    assert (clipped.table.prompt_lens == np.minimum(free.prompt_lens[:500], 300)).all()
    assert (clipped.table.prompt_lens + clipped.table.output_lens).max() == 600


def test_clipping_leaves_room_for_one_output_token():
    options = {
        "prompt_len": {"mean": 500, "sigma": 1.0, "min": 4, "max": 4000},
        "max_total_len": 64,
        "on_exceed": "clip",
    }
    output = {"mean": 100, "sigma": 0.5, "min": 4, "max": 1000}
    table = LognormalWorkload(num_requests=300, seed=0, vocab_size=10, output_len=output, **options).table
    assert table.prompt_lens.max() == 63
    assert table.output_lens.min() == 1


def test_description_is_one_line_with_source_and_facts():
    text = ShareGPTWorkload(num_requests=64, seed=7, vocab_size=10, max_total_len=2048).description
    assert "\n" not in text
    for part in ("sharegpt: 64 requests", "prompt mean", "CV", "dropped", "seed 7", "Fig. 11", "assumed"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_requests": 0}, "workload.num_requests=0 must be an integer"),
        ({"num_requests": True}, "workload.num_requests=True must be an integer"),
        ({"num_requests": None}, "workload.num_requests=null"),
        ({"num_requests": 2.5}, "workload.num_requests=2.5"),
        ({"seed": -1}, "workload.seed=-1"),
        ({"prompt_len": {"min": 0, "max": 4}}, "workload.prompt_len.min=0 must be an integer in"),
        ({"prompt_len": {"min": 5, "max": 4}}, "workload.prompt_len.max=4 must be an integer in [5,"),
        ({"output_len": {"min": 5}}, "workload.output_len lacks the key 'max'"),
        ({"output_len": {"min": 5, "max": 6, "mean": 5}}, "unknown key workload.output_len.mean"),
        ({"output_len": 7}, "workload.output_len=7 must be a mapping"),
        ({"reserved_token_ids": range(300)}, "all 300 token ids"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as error:
        uniform(**options).items()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"mean": 2000, "sigma": 1.0, "min": 4, "max": 1024}, "cannot be reached"),
        ({"mean": 5, "sigma": 0, "min": 4, "max": 1024}, "sigma=0 must be a finite number above 0"),
        ({"mean": float("nan"), "sigma": 1, "min": 4, "max": 1024}, "mean=nan must be a finite number"),
        ({"mean": 4, "sigma": 1, "min": 4, "max": 4}, "workload=fixed"),
    ],
)
def test_bad_lognormal(length, message):
    with pytest.raises(ConfigError, match=message):
        LognormalWorkload(num_requests=1, seed=0, vocab_size=10, prompt_len=length, output_len=length)


def test_limits_that_nothing_fits_end_with_an_error():
    with pytest.raises(ConfigError, match="within the length limits"):
        ShareGPTWorkload(num_requests=50, seed=0, vocab_size=10, max_total_len=2).items()
    with pytest.raises(ConfigError, match=r"workload\.on_exceed=cut must be one of clip, drop"):
        ShareGPTWorkload(num_requests=50, seed=0, vocab_size=10, on_exceed="cut")
