"""PagedAttention's latency, block-size and sharing studies at small scale, and the verdicts that they must not give."""

import pytest
from hydra.utils import instantiate
from study_run import run_study

from engine.errors import ConfigError
from experiments.compose import compose_cell
from experiments.studies import orca
from experiments.studies.base import Verdict, between, near, up_to
from experiments.studies.curves import Curve, highest_below

FIGURE_12 = (
    "experiment=paper_fig12",
    "study.duration=60",
    "study.rates=[0.4,6]",
    "study.limit=0.1",
    "study.other_limits=[0.1]",
)


def verdicts(findings):
    return {claim.quantity: claim.verdict for claim in findings.claims}


def test_figure_12_orders_the_systems_and_notices_equal_ones(tmp_path):
    findings, _ = run_study(tmp_path, *FIGURE_12)
    ratios = {claim.quantity.rpartition(" against ")[2]: claim.ours for claim in findings.claims}
    assert 1 < ratios["Orca (Oracle)"] < ratios["Orca (Max)"] < ratios["FasterTransformer"]
    (chart,) = findings.charts
    assert [series.name for series in chart.series] == [*orca.SYSTEMS, orca.FASTER_TRANSFORMER]
    found = {series.name: Curve(series.x, series.y) for series in chart.series}
    same = {system: highest_below(found["Orca (Max)"], 0.1) for system in found}
    study = instantiate(compose_cell(list(FIGURE_12))[0].study)
    assert study._claim("Orca (Max)", same).verdict is Verdict.DIFFERS
    never_overloaded = same | {"vLLM": None}
    assert study._claim("Orca (Max)", never_overloaded).verdict is Verdict.NOT_COMPARABLE


@pytest.mark.parametrize("bad", ["study.rates=[2,1]", "study.rates=[1]", "study.duration=0", "study.limit=0"])
def test_figure_12_refuses_bad_settings(tmp_path, bad):
    with pytest.raises(Exception, match=bad.split("=", maxsplit=1)[0]) as error:
        run_study(tmp_path, "experiment=paper_fig12", bad)
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_where_a_curve_crosses_a_limit():
    assert highest_below(Curve([1, 2, 4], [0.1, 0.2, 0.6]), 0.3) == pytest.approx(2.5)
    assert highest_below(Curve([1, 2], [0.5, 0.6]), 0.3) is None
    assert highest_below(Curve([1, 2], [0.1, 0.2]), 0.3) is None


def test_ranges_and_shares_are_judged():
    assert between("x", "", 1.7, 2.7, 2.0).verdict is Verdict.HOLDS
    assert between("x", "", 1.7, 2.7, 2.8).verdict is Verdict.DIFFERS
    assert between("x", "", 1.7, 2.7, 2.8).stated == 2.7
    assert between("x", "", 1.7, 2.7, None).verdict is Verdict.NOT_COMPARABLE
    assert up_to("x", "", 22.0, 8.2).verdict is Verdict.HOLDS and up_to("x", "", 22.0, 8.2).stated == 22.0
    assert up_to("x", "", 2.6, 0.9).verdict is Verdict.DIFFERS
    assert near("x", "", 10.0, 12.6, 0.25).verdict is Verdict.DIFFERS


def test_large_blocks_cost_alpaca_and_not_sharegpt(tmp_path):
    small = ("study.block_sizes=[16,256]", "study.num_requests={sharegpt:150,alpaca:900}")
    findings, _ = run_study(tmp_path, "experiment=paper_fig18", *small, "study.rates={sharegpt:2,alpaca:60}")
    found = verdicts(findings)
    assert found["(b) alpaca, block size 256: latency against the best"] is Verdict.HOLDS
    assert found["(b) alpaca, block size 16: latency against the best"] is Verdict.HOLDS
    easy, _ = run_study(tmp_path / "easy", "experiment=paper_fig18", *small, "study.rates={sharegpt:1,alpaca:5}")
    assert verdicts(easy)["(b) alpaca, block size 256: latency against the best"] is Verdict.DIFFERS


def test_samples_save_memory_only_where_blocks_are_shared(tmp_path, monkeypatch):
    small = ("experiment=paper_fig15", "study.num_samples=[6]", "study.num_requests={sharegpt:50,alpaca:150}")
    findings, _ = run_study(tmp_path / "right", *small)
    found = {claim.quantity: claim for claim in findings.claims}
    assert found["alpaca, 6 samples: memory saved"].ours > 5
    assert found["sharegpt, 6 samples: memory saved"].ours > 15
    assert found["alpaca, beam search of 6: memory saved"].verdict is Verdict.NOT_COMPARABLE
    monkeypatch.setitem(orca.SYSTEMS, "vLLM", "orca_oracle")  # which cannot share
    wrong, _ = run_study(tmp_path / "wrong", *small)
    assert verdicts(wrong)["alpaca, 6 samples: memory saved"] is Verdict.DIFFERS
