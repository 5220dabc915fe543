"""A study runs its cells, leaves study.json, and its report is made from that alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.studies.base import Verdict, at_least, at_most, within
from reports.__main__ import make_report
from reports.errors import ReportError
from reports.study import write_study_report

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, stated: int) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "run.py",
        f"hydra.run.dir={out}",
        f"study={{_target_: tests.studies.one_cell.OneCell, stated: {stated}}}",
        "workload=fixed",
        "workload.num_requests=3",
        "workload.prompt_len=8",
        "workload.output_len=4",
        "report.progress=false",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_study_runs_its_cells_and_reports_its_claims(tmp_path):
    done = run(tmp_path, stated=3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["summary"]["num_holding"] == 1
    assert result["summary"]["claims"][0]["ratio"] == 1.0
    assert (tmp_path / "cells" / "orca" / "requests.parquet").exists()
    manifest = json.loads((tmp_path / "cells" / "orca" / "manifest.json").read_text())
    assert manifest["strategy"]["allocator"] == "orca_max"
    markdown = (tmp_path / "report.md").read_text()
    assert "1 of 1 claims hold." in markdown
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert make_report([tmp_path]) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text() == before


def test_claims_are_judged_by_their_tolerance():
    assert within("share", "%", 20.4, 25.3, 5).verdict is Verdict.HOLDS
    assert within("share", "%", 20.4, 25.5, 5).verdict is Verdict.DIFFERS
    assert at_least("rate", "", 2.0, 1.9).verdict is Verdict.DIFFERS
    assert at_most("gap", "s", 2.0, 1.9).verdict is Verdict.HOLDS


def test_a_broken_study_file_is_one_line(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ReportError, match="run the experiment again"):
        write_study_report(tmp_path)
