"""Routers beside one large cache, real replicas replayed, scale-out, and tables against recordings: each in small."""

import json
from pathlib import Path

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.recordings import read_recording, write_recording
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.experiments.studies.scale.routing import RoutingStudy
from kvarena.experiments.studies.scale.scale_out import ScaleOutStudy

ROOT = Path(__file__).resolve().parents[2]


def claims(findings) -> dict:
    return {claim.quantity: claim for claim in findings.claims}


@pytest.fixture
def trace(tmp_path) -> Path:
    """Ten conversations of four turns: a prompt is the one before and 512 tokens more."""
    rows = [
        {"timestamp": 1000 * (4 * turn + user), "input_length": 512 * (turn + 1), "output_length": 4,
         "hash_ids": [100 * user + block for block in range(turn + 1)]}
        for user in range(10) for turn in range(4)
    ]  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["timestamp"])))
    return path


def test_routers_beside_one_cache_of_their_size(tmp_path, trace):
    findings, _ = run_study(
        tmp_path / "study", "experiment=routing", f"study.path={trace}", "study.num_replicas=2",
        "study.routers=[round_robin,kv_exact]", "study.num_slots=20000", "study.block_size=16", "arrival.speed=1",
    )  # fmt: skip
    found = claims(findings)
    whole, exact, turns = (found[f"{name}: hit rate"].ours for name in ("one cache", "kv_exact", "round_robin"))
    assert whole == pytest.approx(60.0, abs=1)  # of four turns all but the first block of each: 0 + 1 + 2 + 3 of 10
    assert whole >= exact > turns
    assert found["largest hit rate of all"].verdict is Verdict.PASSES
    assert found["kv_exact: imbalance"].ours >= 1 and "one cache: imbalance" not in found
    assert [chart.name for chart in findings.charts] == ["hit_rate", "goodput", "imbalance"]
    assert (tmp_path / "study" / "profiles" / "h200-x2.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": None}, "study.path is empty"),
        ({"routers": []}, "study.routers is empty"),
        ({"num_replicas": 1}, "study.num_replicas=1 must be an integer of at least 2"),
    ],
)
def test_a_study_of_nothing_is_a_line(options, words):
    whole = {"path": "x", "num_requests": None, "num_replicas": 2, "routers": ["kv_exact"], "profile": "h200",
             "num_slots": 1000, "block_size": 16, "max_total_len": 1000}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        RoutingStudy(**whole | options)
    assert words in str(error.value)


def test_real_replicas_are_routed_again_and_the_equal_share_is_told(tmp_path):
    findings, _ = run_study(
        tmp_path / "study", "experiment=routing_replay", "study.routers=[kv_exact]", "workload.num_requests=32",
        "workload.output_len.mean=12", "workload.output_len.max=24",
    )  # fmt: skip
    found = claims(findings)
    for what in ("requests routed the same", "steps that decide the same"):
        assert found[f"kv_exact: {what}, recorded times"].verdict is Verdict.PASSES
        assert 0 <= found[f"kv_exact: {what}, own clock"].ours <= 100
    assert "behind 1 of 1 routers" in findings.headline


def test_scale_out_takes_every_layout_that_divides_the_cards(tmp_path):
    cells = CellRunner(["experiment=scale_out", "study=null", "report.pages=false"], tmp_path / "study")
    model = {"llama-3.1-8b-shape": {"users": 4, "layouts": [[1, 1], [2, 1]]}}
    findings = ScaleOutStudy(model, [1, 2], rounds=2, router="least_kv").run(cells)
    assert findings.title.startswith("Scale-out; collectives: AIConfigurator's tables")
    cells = {quantity.split(":")[0] for quantity in claims(findings)}
    assert cells == {
        "llama-3.1-8b-shape, 1 card, TP 1, 1 replica",
        "llama-3.1-8b-shape, 2 cards, TP 1, 2 replicas",
        "llama-3.1-8b-shape, 2 cards, TP 2, 1 replica",
    }
    found = claims(findings)
    one, two = (found[f"llama-3.1-8b-shape, 2 cards, {layout}: TPOT, median"].ours
                for layout in ("TP 1, 2 replicas", "TP 2, 1 replica"))  # fmt: skip
    assert two < one  # half the weights a card, and a little lost to one another
    assert len(findings.charts) == 3


@pytest.mark.parametrize("model", [{"layouts": [[1, 1]]}, {"layouts": [], "users": 1}, {"layouts": [2], "users": 1}])
def test_a_model_without_layouts_is_a_line(model):
    with pytest.raises(ConfigError, match=r"study\.models\.x"):
        ScaleOutStudy({"x": model}, [1], 1, "least_kv")


def test_tables_are_held_against_a_recorded_cell(tmp_path):
    """One held-out cell of the repository's recordings, which are of before some columns were there."""
    cells = read_recording(ROOT / "docs" / "results" / "h200-simulator" / "recordings", "llama-3.1-8b")
    kept = [cell for cell in cells if cell["manifest"]["name"] == "sjf4096-tail-load2"]
    (tmp_path / "recordings").mkdir()
    write_recording(kept, tmp_path / "recordings", "llama-3.1-8b")
    findings, _ = run_study(
        tmp_path / "study", "experiment=profile_error", f"study.recordings={tmp_path / 'recordings'}"
    )
    found = claims(findings)
    claim = found["llama-3.1-8b, sjf4096-tail-load2: error in tokens/s"]
    assert claim.kind is Kind.CHECK and claim.ours < 20 and claim.beside < 5
    steps = found["llama-3.1-8b-shape, two cards by tensor parallel, 256 requests: decode step"]
    assert steps.stated == 10.0 and 8 < steps.ours < 12
    two = [claim for name, claim in found.items() if name.endswith("error of the card fitted to one")]
    assert len(two) == 6 and all(claim.stated == 8.0 and claim.ours <= 8.0 for claim in two)
