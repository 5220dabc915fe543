"""The paper's claims on small files in Bailian's format, against counts by hand; without files they are not run."""

import json
import random

import pytest
from hydra.errors import InstantiationException
from study_run import run_study

from kvarena.engine.errors import TraceError
from kvarena.experiments.studies.caches.kvcache_in_the_wild import _facts, _read
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.reports.pages.study_claims import tally

STUDY = "experiment=kvcache_in_the_wild"


def row(chat, parent, time, ids, turn, kind="text"):
    return {
        "chat_id": chat, "parent_chat_id": parent, "timestamp": time, "input_length": 16 * len(ids), "output_length": 4,
        "type": kind, "turn": turn, "hash_ids": ids,
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def chats(tmp_path):
    """Chats that go on for two to six turns a minute apart, between questions about files that nobody asks again."""
    rng, rows, number = random.Random(0), [], 0
    for chat in range(60):
        time, ids, parent = rng.uniform(0, 3000), [0], -1
        for turn in range(1, 1 + rng.choice([2, 4, 6])):
            ids = [*ids, *(1000 * chat + 10 * turn + i for i in range(1, 4))]
            rows.append(row(number, parent, round(time, 2), ids, turn))
            parent, number, time = number, number + 1, time + rng.expovariate(1 / 60)
    for one in range(400):
        ids = [10**6 + 10 * one + i for i in range(6)]
        rows.append(row(number + one, -1, round(rng.uniform(0, 3300), 2), ids, 1, "file"))
    rows.sort(key=lambda one: one["timestamp"])
    return write(tmp_path / "chats.jsonl", rows)


def test_facts_are_what_a_count_by_hand_gives(tmp_path):
    rows = [
        row(1, -1, 0.0, [1, 2, 3], 1), row(2, -1, 5.0, [1, 4], 1), row(3, 1, 700.0, [1, 2, 3, 5], 2),
        row(4, 3, 710.0, [1, 2, 3, 5, 6], 3), row(5, -1, 711.0, [9], 1), row(6, -1, 712.0, [9], 1),
    ]  # fmt: skip
    facts = _facts(_read(str(write(tmp_path / "t.jsonl", rows))), soon=600.0)
    assert facts["endless"] == pytest.approx(100 * (0 + 1 + 3 + 4 + 0 + 1) / 16)
    assert facts["first_turns"] == pytest.approx(100 * 4 / 6)
    assert facts["hits_of_first_turns"] == pytest.approx(100 * 2 / 9)
    # Reuse after 5; 695, 700, 700; 10 four times; 1 s.
    assert facts["soon"] == pytest.approx(100 * 6 / 9)
    # Lifespans of blocks 1 to 6 and 9: 710, 710, 710, 0, 10, 0, 1 s; a tenth of seven blocks is one, used thrice more.
    assert facts["top_tenth"] == pytest.approx(100 * 3 / 9)
    assert facts["lifespan_p90"] == 710 and facts["turn_p90"] == 2.5


def test_with_its_file_a_trace_is_judged_and_the_other_one_is_not_run(tmp_path, chats):
    findings, _ = run_study(tmp_path / "study", STUDY, f"study.path.A={chats}", "study.shares=[0.02,0.05]")
    of_a = [claim for claim in findings.claims if claim.quantity.startswith("Trace A")]
    published = [claim for claim in of_a if claim.kind not in (Kind.OURS, Kind.CHECK)]
    assert len(published) == 6 and all(claim.ours is not None for claim in published)
    assert all(claim.verdict is Verdict.PASSES for claim in of_a if claim.kind is Kind.CHECK)
    values = {claim.quantity: claim.ours for claim in of_a}
    # Files are never asked for again, and chats soon: who knows that keeps chats.
    size = "Trace A (to consumers), 5% of the blocks"
    assert values[f"{size}, workload: hits"] > 1.1 * values[f"{size}, lru: hits"] > 0
    assert values["Trace A (to consumers), largest gain in hits over the best of the baselines"] > 10
    assert [chart.name for chart in findings.charts] == ["hits_A"]
    others = [claim for claim in findings.claims if claim not in of_a]
    assert len(others) == 7 and all(claim.ours is None and claim.tolerance == "not run" for claim in others)


def test_without_files_nothing_is_run_and_nothing_counted(tmp_path):
    findings, _ = run_study(tmp_path / "study", STUDY)
    assert findings.claims and all(claim.tolerance == "not run" for claim in findings.claims)
    assert all(claim.verdict is Verdict.NOT_COMPARABLE for claim in findings.claims)
    counts = tally([claim.__dict__ | {"kind": claim.kind.value} for claim in findings.claims])
    assert counts["num_judged"] == counts["num_differing"] == counts["num_checks"] == 0
    assert "nothing was run" in findings.headline and "study.path.A=FILE" in findings.claims[0].note


def test_what_is_no_trace_of_the_paper_is_one_line(tmp_path):
    with pytest.raises(InstantiationException, match=r"study\.path\.C: the paper's traces are A and B"):
        run_study(tmp_path / "c", STUDY, "+study.path.C=x.jsonl")
    with pytest.raises(InstantiationException, match="must be shares above 0"):
        run_study(tmp_path / "s", STUDY, "study.shares=[0]")
    with pytest.raises(InstantiationException, match="workload none of them"):
        run_study(tmp_path / "b", STUDY, "study.baselines=[workload]")
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0}\n')
    with pytest.raises(TraceError, match="this key is missing"):
        run_study(tmp_path / "t", STUDY, f"study.path.A={tmp_path / 't.jsonl'}")
