"""Identical cells, at small scale; and what the study makes of numbers."""

import json

import numpy as np
import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.aa_test import FALSE_VERDICTS, SMALLEST, smallest_effects
from kvarena.reports.comparing.verdicts import THROUGHPUT, compare_cells

SMALL = ("experiment=aa_test", "study.num_cells=2", "study.rounds=2", "workload.num_requests=4",
         "workload.output_len={min:4,max:8}", "driver.probe=false")  # fmt: skip


def test_it_runs_every_cell_once_a_round_and_says_both_numbers(tmp_path):
    findings, _ = run_study(tmp_path, *SMALL)
    claims = {claim.quantity: claim for claim in findings.claims}
    assert claims[FALSE_VERDICTS].ours >= 0
    smallest = claims[f"{SMALLEST}: output tokens/s"]
    assert "identical cells in 2 rounds" in findings.headline
    shown = "is more than a factor of 10" if smallest.ours is None else f"is {smallest.ours:.1f} %"
    assert findings.headline.endswith(f"{shown}.")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("cells/*/manifest.json")}
    assert {name: one["round"] for name, one in manifests.items()} == {"A-r0": 0, "A-r1": 1, "B-r0": 0, "B-r1": 1}
    ran = sorted(manifests, key=lambda name: manifests[name]["run"]["ended"])
    assert [name[-1] for name in ran] == ["0", "0", "1", "1"]
    assert ran[0][0] != ran[2][0]  # another order


def test_noise_that_hides_everything_is_no_number_of_45_digits():
    """Two rounds on a loaded machine gave "is 179152166612644397320610864089288180565540864.0 %"."""
    loud = np.exp(np.random.default_rng(0).normal(0, 1.0, (3, 2)))
    study = instantiate(compose_cell(SMALL)[0].study)
    for values in (loud, loud**50):
        findings = study._findings({THROUGHPUT: values}, compare_cells({THROUGHPUT: values}), np.ones((3, 2)))
        assert findings.headline.endswith("shows in so many rounds is more than a factor of 10.")
        claim = next(claim for claim in findings.claims if SMALLEST in claim.quantity)
        assert claim.ours is None
        assert "too few rounds, or too much noise" in claim.note


def test_the_smallest_effect_is_one_that_the_rule_decides_in_nine_of_ten():
    rng = np.random.default_rng(0)

    def table(noise, effect=1.0):
        values = 100 * np.exp(rng.normal(0, noise, (2, 5)))
        values[1] *= effect
        return {THROUGHPUT: values, "e2e_seconds": 1 / values}

    noise = rng.normal(0, 0.01, (400, 5)) + rng.normal(0, 0.1, 5)  # a round's own speed is no noise of a ratio
    effect = smallest_effects({THROUGHPUT: np.exp(noise)}, compare_cells(table(0.01)))[THROUGHPUT]
    assert 1 < effect < 1.1
    decided = sum(compare_cells(table(0.01, effect))[0].is_decided for _ in range(400))
    assert 0.85 < decided / 400 < 0.95


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.num_cells=1", r"study.num_cells=1 must be an integer in \[2, 26\]"),
        ("study.rounds=1", r"study.rounds=1 must be at least 2"),
    ],
)
def test_what_says_nothing_is_refused(override, message):
    with pytest.raises(Exception, match=message) as caught:
        instantiate(compose_cell([*SMALL, override])[0].study)
    assert isinstance(caught.value.__cause__, ConfigError)


def test_a_simulated_machine_has_no_noise(tmp_path):
    with pytest.raises(ConfigError, match="a simulated run has none"):
        run_study(tmp_path, *SMALL, "runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16")
