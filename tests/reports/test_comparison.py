"""The comparison of a sweep: the grid, paired ratios, the token gate, and any differing setting."""

import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sparing
from fake_runs import REQUEST_SCHEMA, STEP_SCHEMA, fake_run, write_run
from rich.console import Console

from kvarena.reports.comparing.cells import differing_settings
from kvarena.reports.comparing.pairing import make_cells
from kvarena.reports.pages.comparison import compare, summarize_comparison, write_comparison
from kvarena.reports.pages.summary import summarize
from kvarena.reports.pages.terminal import comparison_table, run_table
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_run

GRID = [(a, s) for a in ("contiguous", "paged") for s in ("static", "continuous")]


def _summarize(*folders, baseline=None):
    """The comparison's summary, without drawing anything."""
    runs = [(folder.name, run := read_run(folder), summarize(run)) for folder in folders]
    return summarize_comparison(make_cells(runs, baseline), [])


def _sweep(path, names, baseline=None, failed=()):
    (path / "sweep.json").write_text(json.dumps({"runs": names, "baseline": baseline, "failed": list(failed)}))
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The 2 x 2 grid and its comparison."""
    path = tmp_path_factory.mktemp("sweep")
    for index, (allocator, scheduler) in enumerate(GRID):
        fake_run(path / str(index), allocator, scheduler, num_requests=24)
    failed = [{"name": "buddy x static", "error": "the pool is too small for one block"}]
    _sweep(path, list("0123"), failed=failed)
    with sparing.nothing_spared():
        return path, write_comparison(path)


def test_writes_every_file(sweep):
    path, summary = sweep
    assert json.loads((path / "summary.json").read_text()) == summary
    page = (path / "report.html").read_text()
    assert len(page) < 3_000_000
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 100, "ids of different figures clash"
    assert "the pool is too small for one block" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*""", page)
    markdown = (path / "report.md").read_text()
    for name in re.findall(r"\((figures/[^)]*)\)", markdown):
        assert (path / name).exists()


def test_grid_and_baseline(sweep):
    summary = sweep[1]
    assert [cell["label"] for cell in summary["cells"]] == [f"{a} × {s}" for a, s in GRID]
    assert summary["baseline"] == "contiguous × static"
    assert summary["settings"] == ["allocator", "scheduler"]  # block size and reservation belong to their allocators
    assert summary["cells"][0]["paired"] is None
    assert summary["cells"][3]["output_tokens_per_second_ratio"] > 1


def test_csv_has_a_row_per_cell(sweep):
    rows = list(csv.DictReader((sweep[0] / "comparison.csv").open()))
    assert len(rows) == 4
    assert float(rows[3]["ttft_seconds_p99"]) == sweep[1]["cells"][3]["ttft_seconds"]["p99"]
    assert float(rows[3]["paired_e2e_seconds_ratio"]) < 1
    assert rows[3]["paired_e2e_seconds_interval"] == ""
    runs = list(csv.DictReader((sweep[0] / "runs.csv").open()))
    assert [row["cell"] for row in runs] == [row["label"] for row in rows]


def test_all_cells_gave_the_same_tokens(sweep):
    same = sweep[1]["same_tokens"]
    assert same["verdict"] == "same"
    assert same["line"].startswith("All 4 cells gave the same tokens (22 requests")
    assert "\n" not in same["line"]


def test_one_wrong_token_is_found(tmp_path):
    fake_run(tmp_path / "a", num_requests=12)
    fake_run(tmp_path / "b", "contiguous", "static", num_requests=12, wrong_token=7)
    same = write_comparison(_sweep(tmp_path, ["a", "b"]))["same_tokens"]
    assert same["verdict"] == "different"
    (entry,) = same["cells"]
    assert entry["num_different"] == 1
    assert entry["first_divergence"]["position"] == 7
    assert entry["first_divergence"]["request_id"] == "r0005"
    assert entry["first_divergence"]["token_id"] == entry["first_divergence"]["reference_token_id"] + 1
    assert "1 of 10 requests" in same["line"] and "output token 7" in same["line"]
    assert 'class="verdict bad"' in (tmp_path / "report.html").read_text()


def test_rejected_requests_are_reported_apart(tmp_path):
    fake_run(tmp_path / "a", num_requests=12, num_rejected=2)
    fake_run(tmp_path / "b", num_requests=12, num_rejected=0)
    same = _summarize(tmp_path / "a", tmp_path / "b")["same_tokens"]
    assert same["verdict"] == "same"
    assert same["cells"][0]["num_rejected_in_one"] == 2
    assert "rejected" in same["line"]


def test_a_truncated_output_differs_where_it_ends(tmp_path):
    fake_run(tmp_path / "a", num_requests=8)
    fake_run(tmp_path / "b", num_requests=8)
    rows = pq.read_table(tmp_path / "b" / "requests.parquet", schema=REQUEST_SCHEMA).to_pylist()
    steps = pq.read_table(tmp_path / "b" / "steps.parquet", schema=STEP_SCHEMA).to_pylist()
    rows[4]["output_token_ids"] = rows[4]["output_token_ids"][:3]
    write_run(tmp_path / "b", rows, steps, "paged", "continuous", 7680, 16)
    (entry,) = _summarize(tmp_path / "a", tmp_path / "b")["same_tokens"]["cells"]
    assert entry["first_divergence"]["position"] == 3
    assert entry["first_divergence"]["token_id"] is None


def test_order_of_requests_does_not_matter(tmp_path):
    fake_run(tmp_path / "a", num_requests=12)
    fake_run(tmp_path / "b", num_requests=12)
    rows = pq.read_table(tmp_path / "b" / "requests.parquet", schema=REQUEST_SCHEMA).to_pylist()
    steps = pq.read_table(tmp_path / "b" / "steps.parquet", schema=STEP_SCHEMA).to_pylist()
    write_run(tmp_path / "b", rows[::-1], steps, "paged", "continuous", 7680, 16)
    summary = _summarize(tmp_path / "a", tmp_path / "b")
    assert summary["same_tokens"]["verdict"] == "same"
    assert summary["cells"][1]["paired"]["e2e_seconds"]["requests"]["p50"] == 1


def test_other_settings_become_columns_and_each_has_its_own_baseline(tmp_path):
    names = []
    for rate in (4, 16):
        for allocator in ("contiguous", "paged"):
            names.append(f"{allocator}{rate}")
            fake_run(tmp_path / names[-1], allocator, num_requests=12, rate=rate, config={"arrival": {"rate": rate}})
    summary = _summarize(*(tmp_path / name for name in names), baseline="contiguous x continuous")
    assert summary["settings"] == ["allocator", "scheduler", "arrival.rate"]
    assert [cell["baseline"] for cell in summary["cells"]] == [
        "contiguous × continuous, rate=4",
        "contiguous × continuous, rate=4",
        "contiguous × continuous, rate=16",
        "contiguous × continuous, rate=16",
    ]


def _layout_cells(path, seeds=(0,)):
    folders = []
    for seed in seeds:
        for allocator, layout, speed in (
            ("contiguous", "paged", 1.0),
            ("contiguous", "contiguous", 1.25),
            ("paged", "paged", 1.0),
        ):
            folder = path / f"{allocator}-{layout}-{seed}"
            fake_run(folder, allocator, seed=seed, speed=speed, config={"runner": {"layout": layout}})
            folders.append(folder)
    return folders


def test_capacity_and_kernel_are_told_apart(tmp_path):
    folders = _layout_cells(tmp_path)
    capacity, kernel = _summarize(*folders)["costs"]
    assert (capacity["factor"], capacity["cell"], capacity["against"]) == ("capacity", "paged", "contiguous")
    assert capacity["same"] == "continuous, paged kernel"
    assert (kernel["factor"], kernel["cell"], kernel["against"]) == (
        "the kernel",
        "contiguous kernel",
        "paged kernel",
    )
    assert kernel["same"] == "contiguous, continuous"
    assert kernel["verdicts"]["tpot_seconds"]["ratio"] == pytest.approx(1 / 1.25, rel=0.05)
    assert kernel["verdicts"]["tpot_seconds"]["verdict"] == "one run each: no interval"
    assert kernel["output_tokens_per_second_ratio"] > 1
    # The baseline's side of each factor is what the other is compared with.
    capacity, kernel = _summarize(*folders[::-1])["costs"]
    assert (capacity["cell"], capacity["against"]) == ("contiguous", "paged")
    assert (kernel["cell"], kernel["against"]) == ("contiguous kernel", "paged kernel")
    capacity, kernel = _summarize(*folders[1:], folders[0])["costs"]
    assert (kernel["cell"], kernel["against"]) == ("paged kernel", "contiguous kernel")
    assert kernel["verdicts"]["tpot_seconds"]["ratio"] > 1


def test_capacity_and_kernel_over_seeds(tmp_path):
    entries = _summarize(*_layout_cells(tmp_path, seeds=(0, 1)))["costs"]
    assert [(entry["factor"], entry["num_repeats"]) for entry in entries] == [("capacity", 2), ("the kernel", 2)]
    assert all(entry["verdicts"]["tpot_seconds"]["repeats"] == 2 for entry in entries)


def test_cells_that_are_not_defined_and_both_causes_are_in_the_report(tmp_path):
    folders = _layout_cells(tmp_path)
    not_defined = [{"name": "allocator=paged, runner.layout=contiguous", "error": "blocks are scattered"}]
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out", not_defined=not_defined)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "allocator=paged, runner.layout=contiguous is not defined: blocks are scattered." in text
    assert "What capacity costs: allocators on the same kernel" in text
    assert "What the kernel costs: kernels under the same allocator" in text
    printed = " ".join(_render(comparison_table(summary), width=200).split())
    assert "allocator=paged, runner.layout=contiguous is not defined: blocks are scattered." in printed
    assert "What capacity costs: paged against contiguous (continuous, paged kernel): output tok/s" in printed
    assert "(one run each: no interval)" in printed
    assert "What the kernel costs: contiguous kernel against paged kernel (contiguous, continuous)" in printed


def test_without_two_kernels_there_is_nothing_to_tell_apart(sweep):
    assert sweep[1]["costs"] == []


def test_one_strategy_under_two_pools_compares_with_the_first(tmp_path):
    for total in (4096, 7680):
        fake_run(tmp_path / str(total), num_requests=12, total=total, config={"kv_cache": {"num_slots": total}})
    summary = _summarize(tmp_path / "4096", tmp_path / "7680")
    assert summary["cells"][1]["baseline"] == "paged × continuous, num_slots=4096"
    assert summary["cells"][1]["paired"] is not None


def test_other_prompts_are_not_paired(tmp_path):
    fake_run(tmp_path / "a", num_requests=12, seed=0)
    fake_run(tmp_path / "b", "contiguous", num_requests=12, seed=1)
    summary = _summarize(tmp_path / "a", tmp_path / "b")
    assert summary["same_tokens"]["verdict"] == "not compared"
    assert summary["cells"][1]["paired"] is None


def test_options_of_a_group_count_within_one_choice():
    def manifest(allocator, **options):
        return {
            "strategy": {"allocator": allocator, "scheduler": "static"},
            "config": {
                "allocator": {"_target_": allocator} | options,
                "kv_cache": {"num_blocks": 8},
                "report": {"x": 1},
            },
        }

    runs = [manifest("paged", block_size=16), manifest("contiguous", reservation="max")]
    assert list(differing_settings(runs)[0]) == ["allocator", "scheduler"]
    runs.append(manifest("paged", block_size=32))
    settings = differing_settings(runs)
    assert settings[0]["allocator.block_size"] == 16
    assert settings[1]["allocator.block_size"] is None
    assert "allocator.reservation" not in settings[0]


def test_baseline_names(tmp_path):
    fake_run(tmp_path / "a", num_requests=8)
    fake_run(tmp_path / "b", "contiguous", num_requests=8)
    runs = [(name, run := read_run(tmp_path / name), summarize(run)) for name in ("a", "b")]
    for name in ("b", "contiguous x continuous", "contiguous × continuous", "Contiguous x Continuous"):
        assert make_cells(runs, name)[0].baseline.folder == "b"
    with pytest.raises(ReportError, match="'paged × continuous'"):
        make_cells(runs, "buddy")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": 3}', '{"runs": []}', '{"runs": ["gone"]}'])
def test_a_broken_sweep_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ReportError) as caught:
        write_comparison(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cell_that_finished_nothing(tmp_path):
    fake_run(tmp_path / "a", num_requests=6, num_rejected=6)
    fake_run(tmp_path / "b", "contiguous", num_requests=6, num_rejected=6)
    summary = write_comparison(_sweep(tmp_path, ["a", "b"]))
    assert summary["same_tokens"]["verdict"] == "not compared"
    assert summary["headline"] == "None of 2 cells finished a request."
    _render(comparison_table(summary))


def _render(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_terminal_tables(sweep, tmp_path):
    text = _render(comparison_table(sweep[1]))
    assert "contiguous × static" in text and "baseline" in text and "same tokens" in text
    assert "One run each: no interval" in text and "[0." not in text
    run_dir = fake_run(tmp_path / "run", num_requests=8)
    text = _render(run_table(summarize(read_run(run_dir))))
    assert "6 of 8" in text and "tok/s" in text


def test_any_two_runs(tmp_path):
    fake_run(tmp_path / "a", num_requests=8)
    fake_run(tmp_path / "b", "contiguous", num_requests=8)
    summary = compare([("a", tmp_path / "a"), ("b", tmp_path / "b")], tmp_path / "out" / "ab")
    assert (tmp_path / "out" / "ab" / "report.html").exists()
    assert summary["cells"][1]["baseline"] == "paged × continuous"


def test_runs_measured_at_the_same_time_are_named(tmp_path):
    """Two of three overlap; a run that only touches another's end, or is simulated, does not count."""
    ends = {"paged": "2026-11-24T10:00:00.000+00:00", "contiguous": "2026-11-24T10:00:10.000+00:00",
            "radix": "2026-11-24T10:00:30.100+00:00", "virtual": "2026-11-24T10:00:05.000+00:00"}  # fmt: skip
    for allocator, ended in ends.items():
        path = fake_run(tmp_path / allocator, allocator, num_requests=12) / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["run"]["ended"] = ended  # each took 20.1 s
        manifest["simulation"] = {"profile": "h200", "kind": "card"} if allocator == "virtual" else None
        path.write_text(json.dumps(manifest))
    names = list(ends)
    summary = compare([(name, tmp_path / name) for name in names], tmp_path / "out")
    assert summary["measured_together"] == ["paged × continuous", "contiguous × continuous"]
    line = "so that each slowed the others down: paged × continuous, contiguous × continuous."
    assert line in (tmp_path / "out" / "report.md").read_text()


def test_a_run_beside_itself(tmp_path):
    run = fake_run(tmp_path / "run", num_requests=12)
    summary = compare([("run", run), ("run", run), ("run", run)], tmp_path / "out")
    assert summary["same_tokens"]["verdict"] == "same"
    labels = [f"paged × continuous [run]{again}" for again in ("", " (2)", " (3)")]
    assert [cell["label"] for cell in summary["cells"]] == labels
    assert summary["same_runs"] == [(labels[0], labels[1]), (labels[0], labels[2])]
    line = f"{labels[0]} and {labels[1]} are one run: beside itself it differs in nothing."
    assert line in (tmp_path / "out" / "report.md").read_text()
    assert line in _printed(summary)
    assert [cell["output_tokens_per_second_ratio"] for cell in summary["cells"]] == [1, 1, 1]


def _printed(summary):
    console = Console(file=io.StringIO(), width=400)
    console.print(comparison_table(summary))
    return " ".join(console.file.getvalue().split())


def _simulated(run_dir):
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["simulation"] = {"kind": "card", "profile": "h100"}
    manifest["config"]["runner"] = {"kind": "simulated", "profile": "h100"}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def test_a_cell_that_is_not_paired_says_why(tmp_path):
    """With no pair at all the report had no word of it."""
    one = fake_run(tmp_path / "one", num_requests=8, config={"arrival": {"rate": 2}})
    rate = fake_run(tmp_path / "rate", "contiguous", num_requests=8, config={"arrival": {"rate": 4}})
    prompts = fake_run(tmp_path / "prompts", "contiguous", num_requests=8, seed=1, config={"arrival": {"rate": 2}})
    manifest = json.loads((prompts / "manifest.json").read_text())
    manifest["config"]["workload"]["seed"] = 0
    (prompts / "manifest.json").write_text(json.dumps(manifest))
    summary = compare([("one", one), ("rate", rate), ("prompts", prompts)], tmp_path / "out")
    base, rate_label, prompts_label = (cell["label"] for cell in summary["cells"])
    assert [cell["baseline"] for cell in summary["cells"]] == [base, None, None]
    lines = [
        f"{rate_label} is not paired: no run of the baseline's strategy has its settings "
        f"({base} has arrival.rate=2 and not 4).",
        f"{prompts_label} is not paired: its requests are not those of {base}.",
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    for line in lines:
        assert line in text
        assert line in _printed(summary)


def test_simulated_beside_measured_is_named(tmp_path):
    measured = fake_run(tmp_path / "measured", num_requests=8)
    same = _simulated(fake_run(tmp_path / "same", num_requests=8))
    summary = _summarize(measured, same)
    assert summary["cells"][1]["paired"]
    assert summary["two_clocks"] == [summary["cells"][1]["label"]]
    assert "Simulated beside measured" in _printed(summary)
    other = _simulated(fake_run(tmp_path / "other", "contiguous", num_requests=8))
    reason = _summarize(measured, other)["cells"][1]["unpaired"]
    assert reason.startswith("no run of the baseline's strategy has its settings (")
    assert reason.endswith("; one of them is simulated, the other is measured")


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_attention_in_different_kernels_is_named(tmp_path, kind):
    folders = [fake_run(tmp_path / name, name, num_requests=8) for name in ("paged", "virtual", "contiguous")]
    assert _summarize(*folders)[f"{kind}_kernels"] == {}
    for folder, kernel in zip(folders, ("cuda", "triton"), strict=False):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["pool"]["runner"] = {f"{kind}_kernel": kernel}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert _summarize(folders[0], folders[2])[f"{kind}_kernels"] == {}
    summary = _summarize(*folders)
    labels = [cell["label"] for cell in summary["cells"]]
    assert summary[f"{kind}_kernels"] == {"cuda": [labels[0]], "triton": [labels[1]]}
    assert f"{kind.title()} attention ran in different kernels" in _printed(summary)
    assert "runner.attention=triton gives all cells the same one" in _printed(summary)


def test_runs_without_prompts_say_so(tmp_path):
    one, other = (fake_run(tmp_path / name, num_requests=8) for name in "ab")
    table = pq.read_table(other / "requests.parquet")
    column = table.schema.get_field_index("prompt_token_ids")
    nulls = pa.nulls(len(table), table.schema.field(column).type)
    pq.write_table(table.set_column(column, "prompt_token_ids", nulls), other / "requests.parquet")
    summary = _summarize(one, other)
    assert summary["cells"][1]["unpaired"] == "it recorded no prompts (driver.record=summary)"
    # Both said that the requests were others.
    assert "it recorded no prompts (driver.record=summary)" in summary["headline"]
    assert summary["same_tokens"]["line"] == (
        "Tokens were not compared: 1 of 2 runs recorded none (driver.record=summary)."
    )
