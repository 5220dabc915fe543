"""A run that recorded nothing has a summary of every key and a page, whatever else was measured beside it."""

import json

from fake_runs import fake_run

from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run

TOTALS = {
    "num_requests": 5, "num_finished": 4, "num_rejected": 1, "num_aborted": 0, "num_failed": 0,
    "num_prompt_tokens": 100, "num_output_tokens": 80, "num_finished_prompt_tokens": 90,
    "num_finished_output_tokens": 80, "duration": 2.0,
}  # fmt: skip


def unrecorded(folder):
    """A run beside which the machine was probed, as that of every measured run is."""
    run = fake_run(folder, num_requests=6)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["run"] |= {"recorded": "none", "totals": TOTALS, "num_steps": 7}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run, manifest


def test_it_keeps_what_its_manifest_says_and_knows_nothing_else(tmp_path):
    run, manifest = unrecorded(tmp_path / "run")
    whole = summarize(read_run(fake_run(tmp_path / "whole", num_requests=6)))
    summary = write_run_report(run)
    assert summary.keys() == whole.keys()
    assert summary["contention"] == manifest["contention"]
    assert (summary["output_tokens_per_second"], summary["total_tokens_per_second"]) == (40.0, 85.0)
    assert (summary["requests_per_second"], summary["num_steps"], summary["duration_seconds"]) == (2.0, 7, 2.0)
    assert summary["ttft_seconds"]["p50"] is summary["kv_share_mean"] is summary["busy_seconds"] is None
    page = (run / "report.html").read_text()
    assert "nothing else was recorded" in page
    assert "processor time" in page
    assert "requests.parquet" not in page
    assert not (run / "requests.csv").exists()
