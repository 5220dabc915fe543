"""What a reader must know before a headline stands right below it: on the page, in Markdown, on the terminal."""

from __future__ import annotations

import io
import json

import pytest
from fake_runs import fake_run
from rich.console import Console

from reports.comparison import compare
from reports.run_report import read_summary, write_run_report
from reports.terminal import comparison_table, run_table


def edit_manifest(run_dir, change):
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return run_dir


def printed(table, width=400):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return " ".join(console.file.getvalue().split())


def late(manifest):
    manifest["run"]["lateness_bound"] = 1e-9


def stands_below_the_headline(folder, headline, notice, before):
    """Headline, notice, and only then the rest of the page."""
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        places = [text.index(part) for part in (headline, notice, before[name])]
        assert places == sorted(places)


def test_a_runs_notices_stand_below_its_headline(tmp_path):
    run_dir = edit_manifest(fake_run(tmp_path / "run", num_requests=8), late)
    summary = write_run_report(run_dir)
    (notice,) = summary["notices"]
    assert notice.startswith("Invalid run: ")
    assert json.loads((run_dir / "summary.json").read_text())["notices"] == [notice]
    headline = summary["headline"].replace(" x ", " × ")
    stands_below_the_headline(run_dir, headline, notice, {"report.html": '<dl class="facts">', "report.md": "| Model"})
    assert f"paged × continuous note: {notice} requests 6 of 8" in printed(run_table(summary))


def test_a_run_with_nothing_to_note(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=8)
    assert write_run_report(run_dir)["notices"] == []
    assert 'class="notices"' not in (run_dir / "report.html").read_text()


def test_a_comparisons_notices_stand_below_its_headline(tmp_path):
    folders = [fake_run(tmp_path / "a", num_requests=8), fake_run(tmp_path / "b", "contiguous", num_requests=8)]
    edit_manifest(folders[1], late)
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    (notice,) = summary["notices"]
    assert notice == "Invalid, because the driver fell behind its bound: contiguous × continuous."
    before = {"report.html": '<dl class="facts">', "report.md": "| Model"}
    stands_below_the_headline(tmp_path / "out", summary["headline"], notice, before)
    assert f"{summary['headline']} note: {notice} cell" in printed(comparison_table(summary))


@pytest.mark.parametrize("text", ["[red]100 %[/red]", "a [0.2, 0.3] b"])
def test_brackets_in_a_notice_are_no_markup_of_the_terminal(tmp_path, text):
    summary = write_run_report(fake_run(tmp_path / "run", num_requests=8)) | {"notices": [text]}
    assert f"note: {text}" in printed(run_table(summary))


def test_a_summary_of_before_there_were_notices_is_read(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=8)
    old = write_run_report(run_dir)
    del old["notices"]
    (run_dir / "summary.json").write_text(json.dumps(old))
    assert "requests 6 of 8" in printed(run_table(read_summary(run_dir)))
