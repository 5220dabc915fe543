"""What sharing is worth, taken apart: on the simulator, and without shared reads on a CPU."""

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.sharing import SharingStudy

SMALL = ["study.own=64", "study.output=16", "study.waves=1", "study.rounds=1"]


def values(findings):
    return {claim.quantity: claim.ours for claim in findings.claims}


def test_the_effects_on_the_simulator(tmp_path):
    points = "study.points=[[2,4096,16]]", "study.samples=[[2,2048,4]]", "study.beams=[[2,2048,4]]"
    findings, cells = run_study(tmp_path, "experiment=sharing", *points, *SMALL)
    found = values(findings)
    start = "2 x 4,096 tokens, 16 rows each"
    alone = [found[f"{start}: {name} alone"] for name in ("capacity", "compute", "bandwidth")]
    assert min(alone) > 1.0
    assert found[f"{start}: product of the effects"] == pytest.approx(alone[0] * alone[1] * alone[2])
    assert found[f"{start}: all of sharing"] == pytest.approx(found[f"{start}: whole"] / found[f"{start}: none"])
    assert found[f"{start}: whole"] > found[f"{start}: cached"] > found[f"{start}: given"] > found[f"{start}: none"]
    for kind in ("samples", "beams"):
        assert found[f"2 prompts of 2,048 tokens, 4 {kind} each: read once over read by each"] > 1.0
    assert len(cells.folders) == 7 + 4
    note = next(claim.note for claim in findings.claims if claim.quantity == f"{start}: all of sharing")
    assert ("interaction" in note) == (
        abs(found[f"{start}: all of sharing"] / (alone[0] * alone[1] * alone[2]) - 1) > 0.05
    )


def test_a_cpu_shows_two_of_the_effects(tmp_path):
    findings, cells = run_study(
        tmp_path, "experiment=sharing", "model=demo", "runner=torch", "engine.dtype=float32",
        "engine.max_model_len=512", "study.points=[[1,64,4]]", "study.samples=[[1,32,2]]", "study.beams=[]", *SMALL,
        "study.output=4",
        "scheduler.max_num_batched_tokens=256",
    )  # fmt: skip
    found = values(findings)
    names = {name.split(": ")[1] for name in found if name.startswith("1 x 64")}
    assert names == {"capacity alone", "compute alone", "product of the effects", "all of sharing", "none", "given",
                     "roomy", "cached"}  # fmt: skip
    assert any("On a CPU" in note for note in findings.notes) and len(cells.folders) == 4 + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"points": []}, "at least one"), ({"points": [[1, 2]]}, "lists of"), ({"held": 0}, r"study\.held=0 must")],
)
def test_wrong_settings_are_one_line(settings, message):
    right = {
        "points": [[1, 2, 3]],
        "samples": [],
        "beams": [],
        "own": 1,
        "output": 1,
        "waves": 1,
        "held": 0.5,
        "rounds": 1,
        "near": 0,
    }
    SharingStudy(**right)
    with pytest.raises(ConfigError, match=message):
        SharingStudy(**right | settings)
