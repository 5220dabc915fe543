"""What a reader must know before a headline stands right below it: on the page, in Markdown, on the terminal."""

from __future__ import annotations

import io
import json

import pytest
from fake_runs import fake_run
from rich.console import Console

from kvarena.reports.comparing.notices import run_notices
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import read_summary, write_run_report
from kvarena.reports.pages.terminal import comparison_table, run_table


class NoFigures(dict):
    """They take longer than all else."""

    def __missing__(self, name: str) -> str:
        return "<svg/>"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """No notice is in one."""
    monkeypatch.setattr("kvarena.reports.pages.comparison.draw_comparison", lambda *_: NoFigures())
    monkeypatch.setattr("kvarena.reports.pages.run_report.draw_run", lambda *_: NoFigures())


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


def test_recording_is_not_noted_of_a_run_in_which_no_step_ran(tmp_path):
    """A run that rejected all its requests said that recording took 24.9 % of its time."""
    summary = write_run_report(fake_run(tmp_path / "run", num_requests=8)) | {
        "recording": {"seconds": 1e-4, "share": 0.25}
    }
    assert [line[:21] for line in run_notices(summary)] == ["Recording took 25.0 %"]
    assert run_notices(summary | {"num_steps": 0}) == []


def test_reports_say_by_how_much_kv_bytes_are_overstated(tmp_path):
    """Of models whose layers keep less than the pool holds: latents, windows beside full layers, shared layers."""
    needed = {"num_tokens": 8192, "stored_bytes": 3 * 2**20, "bytes": 2**20, "why": ["2 of 3 layers see 8 tokens"]}
    folders = [fake_run(tmp_path / name, num_requests=8) for name in "ab"]
    for folder in folders:
        edit_manifest(folder, lambda manifest: manifest["model"].update(kv_needed=needed))
    line = (
        "KV bytes of demo are overstated: of its longest request (8,192 tokens) the pool holds 3.00 MiB, 3 times the "
        "1.00 MiB that the model needs (2 of 3 layers see 8 tokens)."
    )
    assert write_run_report(folders[0])["notices"] == [line]
    assert compare([(folder.name, folder) for folder in folders], tmp_path / "compare")["notices"].count(line) == 1


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


CARD = {"kind": "analytic", "profile": "h200", "figures": {"source": "NVIDIA H200 141 GB", "error": "4 % of TPOT."}}
MEASURED = {"kind": "measured", "profile": "h100-qwen", "source": "NVIDIA H100 80GB, commit 3f0e0e8"}


def simulated_run(folder, allocator="paged", simulation=CARD):
    run_dir = fake_run(folder, allocator, num_requests=8)
    return edit_manifest(run_dir, lambda manifest: manifest.update(simulation=simulation))


@pytest.mark.parametrize(
    ("simulation", "profile", "notice"),
    [
        (CARD, "card profile h200", "card profile h200 (NVIDIA H200 141 GB); its error: 4 % of TPOT."),
        (MEASURED, "measured profile h100-qwen",
         "measured profile h100-qwen (NVIDIA H100 80GB, commit 3f0e0e8); it states no error of its times."),
    ],
)  # fmt: skip
def test_a_simulated_run_says_so_in_title_headline_facts_and_terminal(tmp_path, simulation, profile, notice):
    """It showed the laptop's processor as its machine."""
    run_dir = simulated_run(tmp_path / "run", simulation=simulation)
    summary = write_run_report(run_dir)
    assert summary["headline"].startswith(f"Simulated by the {profile}: paged x continuous served 6 of 8 requests")
    (line,) = summary["notices"]
    assert line == f"Simulated: no device computed this; all times are a virtual clock's, by the {notice}"
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# paged × continuous, simulated\n")
    source = (simulation.get("figures") or simulation)["source"]
    assert f"| Machine | {source}; simulated on Intel Xeon Processor, 2 cores, 24.0 GiB |" in text
    assert printed(run_table(summary)).startswith(f"paged × continuous, simulated note: {line}")


def test_a_comparison_of_simulated_runs_says_so(tmp_path):
    runs = [(name, simulated_run(tmp_path / name, name)) for name in ("paged", "contiguous")]
    summary = compare(runs, tmp_path / "out")
    assert summary["headline"].startswith("Simulated: ")
    (notice,) = summary["notices"]
    assert "card profile h200 (NVIDIA H200 141 GB)" in notice
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# 2 runs: allocator, simulated\n")
    assert "| Machine | NVIDIA H200 141 GB; simulated on Intel Xeon Processor, 2 cores, 24.0 GiB |" in text
    assert printed(comparison_table(summary)).startswith(f"{summary['headline']} note: {notice}")


def test_simulated_cells_among_measured_ones_are_named(tmp_path):
    runs = [("paged", fake_run(tmp_path / "paged", num_requests=8)),
            ("contiguous", simulated_run(tmp_path / "contiguous", "contiguous"))]  # fmt: skip
    summary = compare(runs, tmp_path / "out")
    assert summary["headline"].startswith("1 of 2 cells simulated: ")
    assert summary["notices"][0].startswith("Simulated (contiguous × continuous): ")
    assert summary["notices"][1].startswith("Simulated beside measured")
    assert (tmp_path / "out" / "report.md").read_text().startswith("# 2 runs: allocator, 1 of them simulated\n")
