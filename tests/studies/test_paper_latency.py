"""PagedAttention's latency, block-size and sharing studies at small scale, and the verdicts that they must not give."""

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies import orca
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.experiments.studies.curves import Curve, highest_below
from kvarena.experiments.studies.papers.paper_fig12 import EVERY, KEYS, Tried
from kvarena.experiments.studies.papers.published import FIGURE_12_KNEES, SUSTAINED_RATIOS

RATES = ",".join(f"{key}:[0.2,6]" for key in KEYS.values())
FIGURE_12 = (
    "experiment=paper_fig12",
    "study.duration=40",
    f"study.rates={{{RATES}}}",
    "study.limit=0.2",
    "study.other_limits=[0.2]",
    "study.seeds=[0,1]",
    "study.ideal=null",
)


SIZES = pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "seeds"])


def verdicts(findings):
    return {claim.quantity: claim.verdict for claim in findings.claims}


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    """Curves whose given rates are all below the limit, or nearly."""
    rates = FIGURE_12[2].replace("[0.2,6]", "[0.1,0.4]")
    small = (*FIGURE_12, rates, "study.seeds=[0]", "study.step=16")
    return run_study(tmp_path_factory.mktemp("figure-12"), *small)[0]


@SIZES
def test_figure_12_orders_the_systems_and_notices_equal_ones(request, tmp_path, thorough):
    findings = run_study(tmp_path, *FIGURE_12)[0] if thorough else request.getfixturevalue("one_seed")
    found = {claim.quantity: claim for claim in findings.claims}
    ratios = {name: found[f"load that vLLM sustains, over {name}"].ours for name in SUSTAINED_RATIOS}
    assert 1 < ratios["Orca (Oracle)"] < ratios["Orca (Max)"] < ratios["FasterTransformer"]
    loads = {name: found[f"{name}: requests/s at 0.2 s per token"] for name in FIGURE_12_KNEES}
    assert loads["vLLM"].ours == max(claim.ours for claim in loads.values())
    assert loads["vLLM"].stated == 1.9 and loads["vLLM"].kind is Kind.VALUE
    (chart,) = findings.charts
    assert [series.name for series in chart.series] == [*orca.SYSTEMS, orca.FASTER_TRANSFORMER]
    assert not thorough or all(len(series.low) == len(series.y) for series in chart.series)  # one seed has no interval
    study = instantiate(compose_cell(list(FIGURE_12))[0].study)
    curve = Curve([0.2, 6], [0.05, 1.0])
    equal = {claim.quantity: claim.verdict for claim in study._claims(dict.fromkeys(EVERY, Tried([curve, curve])), {})}
    assert equal["load that vLLM sustains, over Orca (Max)"] is Verdict.DIFFERS
    assert equal["load that vLLM sustains, over FasterTransformer"] is Verdict.LESS


def test_a_curve_goes_on_until_it_is_above_every_limit(one_seed):
    for series in one_seed.charts[0].series:
        assert series.y[-1] > 0.2 >= series.y[-2] and series.x[-1] >= 6.4
    # One seed has no interval, so nothing is decided by it.
    judged = {claim.verdict for claim in one_seed.claims}
    assert judged == {Verdict.NOT_DECIDED}


@pytest.mark.parametrize(
    "bad", ["study.rates.vllm=[2,1]", "study.rates.vllm=[1]", "study.duration=0", "study.limit=0", "study.step=1"]
)
def test_figure_12_refuses_bad_settings(tmp_path, bad):
    with pytest.raises(Exception, match=bad.split("=", maxsplit=1)[0]) as error:
        run_study(tmp_path, "experiment=paper_fig12", bad)
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_where_a_curve_crosses_a_limit():
    assert highest_below(Curve([1, 2, 4], [0.1, 0.2, 0.6]), 0.3) == pytest.approx(2.5)
    assert highest_below(Curve([1, 2], [0.5, 0.6]), 0.3) is None
    assert highest_below(Curve([1, 2], [0.1, 0.2]), 0.3) is None


@SIZES
def test_large_blocks_cost_alpaca_and_not_sharegpt(tmp_path, thorough):
    size = ("study.duration={sharegpt:60,alpaca:20}", "study.seeds=[0,1]")
    if not thorough:
        size = ("study.duration={sharegpt:10,alpaca:12}", "study.seeds=[0]")
    small = ("experiment=paper_fig18", "study.block_sizes=[16,256]", *size)
    findings, _ = run_study(tmp_path / "right", *small, "study.rates={sharegpt:2,alpaca:60}", "study.ideal=null")
    found = {claim.quantity: claim for claim in findings.claims}
    large, good = (found[f"(b) alpaca, block size {size}: latency against the best"] for size in (256, 16))
    assert large.ours > 2 and good.ours == 1
    assert good.verdict is (Verdict.HOLDS if thorough else Verdict.NOT_DECIDED)
    assert found["(b) alpaca, largest latency, at block size 256"].ours > 0.5
    easy, _ = run_study(tmp_path / "easy", *small, "study.rates={sharegpt:1,alpaca:2}", "study.ideal_seeds=[0]")
    claim = {claim.quantity: claim for claim in easy.claims}["(b) alpaca, block size 256: latency against the best"]
    assert claim.verdict is (Verdict.DIFFERS if thorough else Verdict.NOT_DECIDED)
    assert claim.ours < 1.5 and claim.beside is not None and claim.beside_low is None
    assert easy.beside == "ideal card (a100-40gb, seed 0)"


def test_samples_save_memory_only_where_blocks_are_shared(tmp_path, monkeypatch):
    small = (
        "experiment=paper_fig15", "study.num_samples=[6]", "study.beam_widths=[]",
        "study.num_requests={sharegpt:16,alpaca:50}", "study.seeds=[0,1]",
    )  # fmt: skip
    findings, _ = run_study(tmp_path / "right", *small)
    found = {claim.quantity: claim for claim in findings.claims}
    assert found["alpaca, 6 samples: memory saved"].ours > 5
    assert found["sharegpt, 6 samples: memory saved"].ours > 15
    monkeypatch.setitem(orca.SYSTEMS, "vLLM", "orca_oracle")  # which cannot share
    wrong, _ = run_study(tmp_path / "wrong", *small)
    assert verdicts(wrong)["alpaca, 6 samples: memory saved"] is Verdict.DIFFERS


def test_beams_save_more_than_samples(tmp_path):
    small = (
        "experiment=paper_fig15", "study.num_samples=[4]", "study.beam_widths=[4]", "study.num_requests={alpaca:12}",
        "study.beam_requests={alpaca:12}", "~study.rates.sharegpt", "study.seeds=[0]",
    )  # fmt: skip
    findings, _ = run_study(tmp_path, *small)
    samples, beams = (claim.ours for claim in findings.claims)
    assert 1.4 * samples < beams < 75
    assert [chart.name for chart in findings.charts] == ["saved_alpaca", "saved_beams_alpaca"]
