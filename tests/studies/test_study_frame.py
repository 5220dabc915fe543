"""A study runs its cells, leaves study.json, and its report is made from that alone."""

import json
import subprocess
from pathlib import Path

import pytest
import sparing
import warm

from kvarena.experiments.settings.compose import compose_cell
from kvarena.reports.__main__ import make_report
from kvarena.reports.pages.study import write_study_report
from kvarena.reports.reading.errors import ReportError

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, stated: int, *more: str) -> subprocess.CompletedProcess:
    command = [
        "run.py",
        f"hydra.run.dir={out}",
        f"study={{_target_: tests.studies.one_cell.OneCell, stated: {stated}}}",
        "workload=fixed",
        "workload.num_requests=3",
        "workload.prompt_len=8",
        "workload.output_len=4",
        "report.progress=false",
        "report.pages=false",
        "driver.probe=false",
        *more,
    ]
    return warm.run(command, ROOT)


@pytest.mark.drawn
def test_a_study_runs_its_cells_and_reports_its_claims(tmp_path):
    done = run(tmp_path, stated=3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["study_dir"], result["report"]) == (str(tmp_path), str(tmp_path / "report.html"))
    counts = {"num_claims": 4, "num_judged": 1, "num_holding": 1, "num_not_comparable": 1, "num_checks": 1,
              "num_passing": 0}  # fmt: skip
    for told in (
        result,
        json.loads(Path(result["summary"]).read_text()),
        json.loads((tmp_path / "study.json").read_text()),
    ):
        assert {key: told[key] for key in counts} == counts
    assert len(done.stdout.splitlines()[-1]) < 2000
    assert (tmp_path / "cells" / "orca" / "requests.parquet").exists()
    manifest = json.loads((tmp_path / "cells" / "orca" / "manifest.json").read_text())
    assert manifest["strategy"]["allocator"] == "orca_max"
    cfg, choices = compose_cell(manifest["command"][2:])  # the cell alone
    assert cfg.study is None and (choices["allocator"], cfg.workload.need("output_len")) == ("orca_max", 4)
    markdown = (tmp_path / "report.md").read_text()
    assert "1 of 1 published numbers hold, 1 not comparable; 0 of 1 checks pass." in markdown
    published, others, checks = (markdown.index(f"## {title}") for title in
                                 ("Published numbers", "Not judged", "Checks"))  # fmt: skip
    assert published < others < checks
    for fact in ("```sh\npython run.py", "| seeds of the workload | 0 |", "| versions | python 3", "| commit |"):
        assert fact in markdown
    assert "imulated" not in markdown
    assert (tmp_path / "figures" / "rates.png").stat().st_size > 5000
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert make_report([tmp_path]) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text() == before


def test_simulated_cells_are_named_in_title_headline_facts_and_on_the_terminal(tmp_path):
    profile = ("model=opt-13b-shape", "engine.dtype=auto", "workload.seed=7")
    done = run(tmp_path, 3, "runner=simulated", "runner.profile=a100-40gb-vllm-2023", *profile)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "rates.png").read_bytes() == sparing.PIXEL  # nobody looks at it
    title, _, headline, *rest = (tmp_path / "report.md").read_text().splitlines()
    assert title == "# One cell (simulated)"
    assert headline == "Simulated: 3 requests finish."
    facts = "\n".join(rest)
    assert "No device computed these cells; step times are by profile (a100-40gb-vllm-2023)." in facts
    assert "known of its error: a100-40gb-vllm-2023: 0.5 % on the two step times" in facts
    assert "| simulated under the profile | a100-40gb-vllm-2023: a100-40gb, with host times fitted" in facts
    assert "| simulator ran on |" in facts and "| machine |" not in facts
    assert "| seeds of the workload | 7 |" in facts
    terminal = " ".join(done.stdout.split())
    assert "One cell (simulated)" in terminal and "No device computed these cells" in terminal
    assert json.loads((tmp_path / "study.json").read_text())["conditions"]["simulated"] is True


def test_a_broken_study_file_is_one_line(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ReportError, match="run the experiment again"):
        write_study_report(tmp_path)


def test_a_study_file_from_before_kinds_and_conditions_is_still_read(tmp_path):
    claim = {
        "unit": "%",
        "stated": 60.0,
        "ours": 50.0,
        "low": None,
        "high": None,
        "tolerance": "at most 60 %",
        "note": "",
    }
    study = {
        "title": "t", "headline": "h", "source": "s", "created": "then", "experiment": None, "charts": [],
        "differences": [], "notes": [], "command": ["python"], "cells": [], "git": {"commit": None, "dirty": None},
        "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": None, "gpu": None},
        "claims": [claim | {"quantity": "a", "verdict": "holds"}, claim | {"quantity": "b", "verdict": "measured"}],
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(study))
    summary = write_study_report(tmp_path)
    assert (summary["num_judged"], summary["num_holding"], summary["num_checks"]) == (1, 1, 0)
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# t\n\nh\n") and "1 of 1 published numbers hold." in markdown
