"""The founding claim on a laptop: the demo model, a few requests, every part of the study."""

import json
import shutil
from pathlib import Path

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building import build, loading
from kvarena.experiments.studies.founding_claim import BEST, FoundingClaimStudy
from kvarena.reports.pages.study import write_study_report

SETTINGS = (
    "experiment=founding_claim", "model=demo", "engine.dtype=bfloat16", "workload.num_requests=4",
    "workload.max_prompt_len=32", "workload.max_output_len=8", "workload.on_exceed=clip", "engine.max_model_len=64",
    "kv_cache.num_slots=128", "study.card_slots=1024", "study.rounds=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The findings, the cells, and how often a model and a runner were made."""
    made = {"load_model": 0, "make_runner": 0}
    patch = pytest.MonkeyPatch()
    for name in made:
        room = loading if name == "load_model" else build
        original = getattr(room, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            made[_name] += 1
            return _original(*args, **kwargs)

        patch.setattr(room, name, counted)
    folder = tmp_path_factory.mktemp("claim")
    yield *run_study(folder, *SETTINGS), made, folder
    patch.undo()


def by_name(findings):
    return {claim.quantity: claim for claim in findings.claims}


def test_the_parts_of_the_gain_multiply_to_the_whole(study):
    claims = by_name(study[0])
    parts = claims["the scheduler's part"].ours * claims["memory's part"].ours
    assert claims["both"].ours == pytest.approx(parts)
    other = (
        claims["memory's part under static batches"].ours * claims["the scheduler's part under paged allocation"].ours
    )
    assert claims["both"].ours == pytest.approx(other)
    assert all(claims[name].low is not None for name in ("both", "price: p99 time per output token"))


def test_it_states_pool_price_and_shares_with_what_they_cover(study):
    findings = study[0]
    assert "a pool cut to 128 slots (the card's own holds 1,024)" in findings.headline
    for word in ("by the scheduler with equal memory", "by memory under the same scheduler", "The price:", "p99",
                 "preemptions", "Over all steps", "In the card's own pool the factor is"):  # fmt: skip
        assert word in findings.headline
    shares = [claim for claim in findings.claims if claim.quantity.startswith("KV pool in token states")]
    assert {claim.quantity.rsplit(", ", 1)[1] for claim in shares} == {
        "over all steps",
        "while requests waited for room",
    }
    assert all(claim.note.endswith("% of the run's step time") for claim in shares)


def test_the_untimed_pair_judges_tokens_by_recorded_scores(study):
    claim = by_name(study[0])["requests whose first differing token is an error"]
    assert claim.ours == 0
    assert "driver.scores" not in claim.note  # all were recorded
    timed = [folder for folder in study[1].folders if "scores" not in folder.name]
    assert len(timed) == 2 * 6 and not any((folder / "scores.parquet").exists() for folder in timed)


def test_the_model_is_loaded_once_and_a_runner_once_per_pool(study):
    # The cut pool, with scores, the card's pool.
    assert study[2] == {"load_model": 1, "make_runner": 3}


def test_rounds_turn_the_order_of_the_cells(study):
    names = [folder.name for folder in study[1].folders]
    first = [name.removesuffix("-round0") for name in names if name.endswith("-round0") and "card" not in name]
    second = [name.removesuffix("-round1") for name in names if name.endswith("-round1") and "card" not in name]
    assert sorted(first) == sorted(second) and first == second[::-1]


def test_a_call_that_was_cut_off_goes_on(study):
    """Its last cell is missing: that one runs, and all others stay as they are."""
    findings, cells, _, folder = study
    last = cells.folders[-1]
    kept = {path: (path / "cell.json").stat().st_mtime_ns for path in cells.folders[:-1]}
    shutil.rmtree(last)
    again, _ = run_study(folder, *SETTINGS)
    assert {path: (path / "cell.json").stat().st_mtime_ns for path in kept} == kept
    assert by_name(again)["the scheduler's part"].ours == by_name(findings)["the scheduler's part"].ours


def test_its_report_is_made_from_study_json(study, tmp_path: Path):
    extra = {"schema_version": 1, "experiment": "founding_claim", "created": "2026-11-30T00:00:00+00:00",
             "git": {"commit": None, "dirty": None}, "machine": {"cores": 2, "cpu": "x", "gpu": None},
             "versions": {}, "command": ["python", "run.py"], "cells": []}  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(study[0].to_json() | extra, default=str))
    write_study_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "memory's part" in text and BEST in text and (tmp_path / "figures" / "kv_split.png").exists()


def test_a_round_at_least():
    with pytest.raises(ConfigError, match=r"study\.rounds=0 must be an integer of at least 1"):
        FoundingClaimStudy(rounds=0)
