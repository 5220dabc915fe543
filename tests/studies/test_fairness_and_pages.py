"""VTC's bound and vAttention's pages, at small scale."""

import pytest
from study_run import run_study

from engine.errors import EngineError
from experiments.studies import vtc_fairness
from experiments.studies.base import Verdict
from experiments.studies.vtc_fairness import spread

VTC = (
    "experiment=vtc_fairness",
    "study.num_requests=250",
    "study.flood_requests=120",
    "study.flood_rate=20",
    "kv_cache.num_slots=8192",
)
VATTENTION = ("experiment=vattention", "workload.num_requests=60", "kv_cache.num_slots=8192")


def by_quantity(findings):
    return {claim.quantity: claim for claim in findings.claims}


def test_vtc_keeps_its_bound_and_arrival_order_does_not(tmp_path, monkeypatch):
    findings, _ = run_study(tmp_path / "right", *VTC)
    found = by_quantity(findings)
    assert found["largest difference of service while both clients wait, VTC"].verdict is Verdict.HOLDS
    fcfs = found["largest difference of service while both clients wait, first come first served"]
    assert fcfs.verdict is Verdict.HOLDS and fcfs.stated == 2 * 2.0 * 8192
    monkeypatch.setattr(vtc_fairness.VtcFairnessStudy, "_scheduler", lambda *_: ["scheduler=chunked"])
    wrong, _ = run_study(tmp_path / "wrong", *VTC)
    assert by_quantity(wrong)["largest difference of service while both clients wait, VTC"].verdict is Verdict.DIFFERS


def test_one_client_alone_has_nobody_to_be_fair_to(tmp_path):
    with pytest.raises(EngineError, match="requests of one client only"):
        run_study(tmp_path, *VTC, "study.num_requests=1")


def test_the_spread_covers_every_stretch_since_the_start():
    assert spread([3.0, -2.0, 5.0]) == 7.0
    assert spread([3.0, 5.0]) == 5.0


def test_small_pages_are_as_good_as_blocks_and_large_ones_waste(tmp_path):
    findings, _ = run_study(tmp_path / "right", *VATTENTION, "study.page_kib=[64,2048]")
    verdicts = [claim.verdict for claim in findings.claims]
    assert verdicts == [*[Verdict.HOLDS] * 4, Verdict.NOT_COMPARABLE]
    wrong, _ = run_study(tmp_path / "wrong", *VATTENTION, "study.page_kib=[1024,2048]")
    assert wrong.claims[0].verdict is Verdict.DIFFERS
