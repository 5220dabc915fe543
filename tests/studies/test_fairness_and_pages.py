"""VTC's bound and vAttention's pages, at small scale."""

import pytest
from study_run import run_study

from kvarena.engine.errors import EngineError
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.experiments.studies.papers import vtc_fairness
from kvarena.experiments.studies.papers.vtc_fairness import spread

VTC = (
    "experiment=vtc_fairness",
    "study.num_requests=250",
    "study.flood_requests=120",
    "study.flood_rate=20",
    "kv_cache.num_slots=8192",
)
SEEDS = pytest.mark.parametrize("seeds", ["[0]", pytest.param("[0,1]", marks=pytest.mark.slow)])
VATTENTION = ("experiment=vattention", "kv_cache.num_slots=8192")
BOUND = "largest difference of service while both clients wait over the theorem's bound"


def by_quantity(findings):
    return {claim.quantity: claim for claim in findings.claims}


@SEEDS
def test_vtc_keeps_its_bound_and_arrival_order_does_not(tmp_path, monkeypatch, seeds):
    findings, _ = run_study(tmp_path / "right", *VTC, f"study.seeds={seeds}")
    found = by_quantity(findings)
    fair, fcfs = (found[f"{BOUND}, {name}"] for name in
                  ("VTC, largest of all seeds", "first come first served, least of all seeds"))  # fmt: skip
    assert fair.verdict is fcfs.verdict is Verdict.PASSES and fair.kind is fcfs.kind is Kind.CHECK
    assert fcfs.ours > 1 > fair.ours
    monkeypatch.setattr(vtc_fairness.VtcFairnessStudy, "_scheduler", lambda *_: ["scheduler=chunked"])
    wrong, _ = run_study(tmp_path / "wrong", *VTC, f"study.seeds={seeds}")
    assert by_quantity(wrong)[f"{BOUND}, VTC, largest of all seeds"].verdict is Verdict.FAILS


def test_one_client_alone_has_nobody_to_be_fair_to(tmp_path):
    with pytest.raises(EngineError, match="requests of one client only"):
        run_study(tmp_path, *VTC, "study.seeds=[0]", "study.num_requests=1")


def test_the_spread_covers_every_stretch_since_the_start():
    assert spread([3.0, -2.0, 5.0]) == 7.0
    assert spread([3.0, 5.0]) == 5.0


@pytest.mark.parametrize("size", [30, pytest.param(60, marks=pytest.mark.slow)])
def test_small_pages_are_as_good_as_blocks_and_large_ones_waste(tmp_path, size):
    small = (*VATTENTION, "study.seeds=[0,1]", f"workload.num_requests={size}")
    findings, _ = run_study(tmp_path / "right", *small, "study.page_kib=[64,2048]")
    checks = [claim for claim in findings.claims if claim.kind is Kind.CHECK]
    assert Verdict.FAILS not in {claim.verdict for claim in checks} and len(checks) == 4
    published = [claim for claim in findings.claims if claim.kind not in (Kind.CHECK, Kind.OURS)]
    assert [claim.verdict for claim in published] == [Verdict.NOT_COMPARABLE]
    wrong, _ = run_study(tmp_path / "wrong", *small, "study.page_kib=[1024,2048]")
    large = next(claim for claim in wrong.claims if claim.kind is Kind.CHECK)
    assert large.ours < large.stated and large.verdict is (Verdict.FAILS if size == 60 else Verdict.NOT_DECIDED)
