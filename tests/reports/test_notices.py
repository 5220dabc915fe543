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


def schedulers(tmp_path, budgets, **others):
    """One run of each scheduler, with its token budget in its config."""
    folders = []
    for name, budget in budgets.items():
        options = {"_target_": name, "max_num_batched_tokens": budget, "max_num_seqs": 64} | others.get(name, {})
        folders.append(fake_run(tmp_path / name, scheduler=name, num_requests=8, config={"scheduler": options}))
    return [(folder.name, folder) for folder in folders]


def test_a_token_budget_that_nobody_swept_is_named_on_the_first_screen(tmp_path):
    """Of the 7.4 times in p99 of TPOT that one sweep credited to `chunked`, 3.8 were its budget."""
    runs = schedulers(tmp_path, {"continuous": 2048, "static": 2048, "chunked": 512}, static={"retire": "hold"})
    summary = compare(runs, tmp_path / "out")
    notice = (
        "Not swept, and yet different, so that a ratio is theirs too: token budget 2,048 (continuous; static), "
        "512 (chunked)."
    )
    assert summary["notices"] == [notice]
    before = {"report.html": '<dl class="facts">', "report.md": "| Model"}
    stands_below_the_headline(tmp_path / "out", summary["headline"], notice, before)
    assert f"note: {notice} cell" in printed(comparison_table(summary))


def test_a_token_budget_that_was_swept_is_a_column_and_no_notice(tmp_path):
    runs = schedulers(tmp_path / "one", {"continuous": 2048, "chunked": 2048})
    runs += schedulers(tmp_path / "two", {"continuous": 512, "chunked": 512})
    summary = compare(runs, tmp_path / "out")
    assert "scheduler.max_num_batched_tokens" in summary["settings"]
    assert summary["notices"] == []


def allocators(tmp_path, **configs):
    return [(name, fake_run(tmp_path / name, name, num_requests=8, config={"allocator": {"_target_": name} | options}))
            for name, options in configs.items()]  # fmt: skip


def test_blocks_and_pools_of_other_sizes_are_named_and_what_defines_a_strategy_is_not(tmp_path):
    runs = allocators(tmp_path, paged={"block_size": 16}, orca_max={"block_size": 1, "reservation": "max"},
                      orca_pow2={"block_size": 1, "reservation": "pow2"})  # fmt: skip
    edit_manifest(runs[0][1], lambda manifest: manifest["pool"].update(num_slots=7664))
    (notice,) = compare(runs, tmp_path / "out")["notices"]
    assert notice.endswith(
        ": block size 16 (paged), 1 (orca_max; orca_pow2); slots of the KV pool 7,664 (paged), "
        "7,680 (orca_max; orca_pow2)."
    )


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (lambda manifest: manifest["git"].update(commit="fedcba9876543210"), "The code differs: 0123456789ab (paged ×"),
        (lambda manifest: manifest["git"].update(dirty=True), "(paged × continuous), 0123456789ab with local changes"),
        (
            lambda manifest: manifest["versions"].update(torch="2.11.0"),
            "The software (torch) differs: 2.13.0+cpu (paged × continuous), 2.11.0 (contiguous × continuous).",
        ),
        (lambda manifest: manifest["machine"].update(cores=64), "The machine differs: 2 cores of Intel Xeon Processor"),
        (lambda manifest: manifest["model"].update(dtype="bfloat16"), "demo in bfloat16 (contiguous × continuous)"),
        (
            lambda manifest: manifest["pool"].update(runner={"graphs": False}),
            "The runner (graphs) differs: none (paged × continuous), False (contiguous × continuous).",
        ),
    ],
)
def test_what_ran_the_cells_is_named_where_it_differs(tmp_path, change, notice):
    runs = [(name, fake_run(tmp_path / name, name, num_requests=8)) for name in ("paged", "contiguous")]
    assert compare(runs, tmp_path / "same")["notices"] == []
    edit_manifest(runs[1][1], change)
    (found,) = compare(runs, tmp_path / "out")["notices"]
    assert notice in found


def test_code_is_compared_by_its_content_where_the_manifests_hold_it(tmp_path):
    """A commit of documentation alone is no other code, nor is a strategy's file that the other cell does not use."""
    runs = [(name, fake_run(tmp_path / name, name, num_requests=8)) for name in ("paged", "contiguous")]
    for index, (name, folder) in enumerate(runs):
        sources = {"hash": f"{name:<12}", "packages": {"engine": "e0"}, "strategy": {f"allocators/{name}.py": name}}
        edit_manifest(folder, lambda manifest, i=index, s=sources: manifest.update(git={"commit": f"{i}"}, sources=s))
    assert compare(runs, tmp_path / "same")["notices"] == []
    edit_manifest(runs[1][1], lambda manifest: manifest["sources"]["packages"].update(engine="e1"))
    (found,) = compare(runs, tmp_path / "out")["notices"]
    assert found == (
        "The code differs: 0, sources paged    (paged × continuous), 1, sources contiguo (contiguous × continuous)."
    )
