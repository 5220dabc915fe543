"""What a comparison says of runs with and without repeats: headline, page, terminal, JSON and CSV."""

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from fake_runs import fake_run
from rich.console import Console

from kvarena.experiments.settings.run_order import order
from kvarena.reports.comparing.costs import end_text
from kvarena.reports.comparing.pairing import make_cells
from kvarena.reports.comparing.repeats import contenders
from kvarena.reports.comparing.verdicts import MACHINE_CHANGED, NO_PAIR, ONE_ORDER, ONE_RUN, ONE_SEED, SAME
from kvarena.reports.drawing.format import interval, seconds
from kvarena.reports.drawing.style import drawing
from kvarena.reports.pages.comparison import compare, summarize_comparison
from kvarena.reports.pages.comparison_figures import memory_panels
from kvarena.reports.pages.summary import summarize
from kvarena.reports.pages.terminal import comparison_table
from kvarena.reports.reading.files import read_run

A, B, C = ("contiguous", "continuous"), ("paged", "continuous"), ("radix", "continuous")


def make_runs(path, cells, num_rounds=1, seeds=(0,), speeds=None, probes=None, simulated=False, left_out=(), seed=3):
    """The runs of a sweep, in its order, a minute apart, with 1 % of noise; `speeds` of cells, `probes` beside them."""
    rng = np.random.default_rng(seed)
    now, folders = datetime(2026, 11, 30, 10, tzinfo=UTC), []
    for block in range(len(seeds) * num_rounds):
        workload_seed, round_ = seeds[block // num_rounds], block % num_rounds
        for index in order(len(cells), block):
            now += timedelta(minutes=1)
            noise = 1.0 if simulated else np.exp(rng.normal(0, 0.01))
            if (index, block) in left_out:
                continue
            folder = path / f"{'-'.join(cells[index])}-{block}"
            fake_run(folder, *cells[index], num_requests=10, num_rejected=0, rate=1000, seed=workload_seed,
                     speed=(speeds or {}).get(index, 1.0) * noise)  # fmt: skip
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["created"] = now.isoformat()
            manifest["round"] = round_ if num_rounds > 1 else None
            if simulated:
                manifest["simulation"] = {"kind": "card", "profile": "h200"}
            elif probes is None:
                del manifest["contention"]
            else:
                manifest["contention"] |= {"probe": {"before": probes[index], "after": probes[index]}}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            folders.append(folder)
    return folders


def summary_of(folders, baseline=None):
    runs = [(folder.name, run := read_run(folder), summarize(run)) for folder in folders]
    return summarize_comparison(make_cells(runs, baseline), [])


def printed(summary, width=400):
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(summary))
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("cells", [[A, B], [A, B, C, ("buddy", "continuous")]])
def test_one_run_each_has_no_interval_and_no_winner_anywhere(tmp_path, cells):
    """A loaded machine made "4.95 times" of such a pair, with an interval over requests of [0.21, 0.23]."""
    folders = make_runs(tmp_path, cells, speeds={1: 2.0}, probes=[1000.0] * len(cells))
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    assert summary["headline"].startswith("One run each: no interval. ")
    assert "fastest" not in summary["headline"]
    assert {entry["verdict"] for entry in summary["verdicts"]} == {ONE_RUN}
    assert all(entry["interval"] is entry["p"] is entry["p_holm"] is None for entry in summary["verdicts"])
    assert "ci95" not in json.dumps({key: value for key, value in summary.items() if key not in ("cells", "runs")})
    for text in (printed(summary), (tmp_path / "out" / "report.md").read_text()):
        assert "One run each: no interval" in text
        assert not re.search(r"\b(higher|lower|significant)\b", text.split("## What the numbers mean")[0])
        assert not re.search(r"\[\d+\.\d+, \d", text)
    assert not re.search(r"\b(higher|lower)\b", (tmp_path / "out" / "comparison.csv").read_text())


def test_a_difference_is_shown_over_rounds(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=5, speeds={1: 1.2}, probes=[1000.0, 1000.0])
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    assert [cell["label"] for cell in summary["cells"]] == ["contiguous × continuous", "paged × continuous"]
    assert [cell["num_repeats"] for cell in summary["cells"]] == [5, 5]
    assert len(summary["runs"]) == 10
    start = "paged × continuous is the fastest of 2 cells with "
    assert summary["headline"].startswith(start)
    assert re.search(r"times contiguous × continuous \(95 % interval \[1\.1\d, 1\.2\d\] over 5 rounds; (very )?sure: p",
                     summary["headline"])  # fmt: skip
    assert {entry["verdict"] for entry in summary["verdicts"]} <= {"higher", "lower"}
    entry = summary["cells"][1]["paired"]["tpot_seconds"]
    low, high = entry["interval"]
    assert low < 1 / 1.2 < high < 1 and entry["p_holm"] <= 0.03
    assert summary["notices"] == []
    assert "higher" in (tmp_path / "out" / "report.md").read_text()
    assert "lower" in printed(summary)


def test_a_lead_that_is_not_shown_is_not_crowned(tmp_path):
    folders = make_runs(tmp_path, [A, B, C], num_rounds=4, speeds={0: 0.7}, probes=[1000.0] * 3)
    summary = summary_of(folders)
    assert summary["headline"].startswith("No difference shown between ")
    assert "contiguous" not in summary["headline"]
    assert ", of 3 cells (ratio " in summary["headline"]
    assert summary["fastest"]["verdict"] == SAME


def test_a_machine_that_changed_decides_nothing(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=4, speeds={1: 1.2}, probes=[1000.0, 1500.0])
    summary = summary_of(folders)
    assert summary["headline"].startswith("Not decided: the machine changed. Its probe ran 1.50 times as fast beside ")
    assert summary["fastest"]["verdict"] == MACHINE_CHANGED
    assert not {entry["verdict"] for entry in summary["verdicts"]} & {"higher", "lower"}
    alone = summary_of(make_runs(tmp_path / "alone", [A, B], speeds={1: 1.2}, probes=[1000.0, 1500.0]))
    assert "The machine changed by more than the effect" in alone["headline"]


def test_runs_without_probes_say_so(tmp_path):
    summary = summary_of(make_runs(tmp_path, [A, B], num_rounds=2))
    assert any(line.startswith("No probe of the machine ran beside these runs") for line in summary["notices"])


def test_one_cell_before_the_other_every_time_is_not_decided(tmp_path):
    """All runs of a and then all of b, as `allocator=a,b workload.seed=0,1,2` ran them: a drift decides."""
    folders = make_runs(tmp_path, [A, B], num_rounds=4, speeds={1: 1.2}, probes=[1000.0] * 2)
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        hour = 10 if manifest["strategy"]["allocator"] == "contiguous" else 11
        manifest["created"] = f"2026-11-30T{hour}:{manifest['round']:02d}:00+00:00"
        (folder / "manifest.json").write_text(json.dumps(manifest))
    summary = summary_of(folders)
    assert {entry["verdict"] for entry in summary["verdicts"]} == {ONE_ORDER}
    assert summary["headline"].startswith("Not decided: ")


def test_simulated_runs_are_repeated_by_seeds_alone(tmp_path):
    one = summary_of(make_runs(tmp_path / "one", [A, B], num_rounds=3, simulated=True))
    assert {entry["verdict"] for entry in one["verdicts"]} <= {ONE_SEED, NO_PAIR}
    assert one["headline"].startswith("Simulated: One seed: no interval.")
    folders = make_runs(tmp_path / "seeds", [A, B], seeds=(0, 1, 2, 3), speeds={1: 1.2}, simulated=True)
    seeds = summary_of(folders)
    assert all(entry["unit"] == "seeds" and entry["repeats"] == 4 for entry in seeds["verdicts"])
    assert seeds["headline"].startswith("Simulated: paged × continuous is the fastest of 2 cells")
    assert not any("Contention" in line for line in seeds["notices"])


def test_runs_alike_without_a_round_are_repeats_by_their_time(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=3, speeds={1: 1.2})
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["round"] = None
        (folder / "manifest.json").write_text(json.dumps(manifest))
    summary = summary_of(folders)
    assert [cell["num_repeats"] for cell in summary["cells"]] == [3, 3]
    assert all(entry["repeats"] == 3 for entry in summary["verdicts"])


def test_runs_of_other_code_are_no_repeats(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=2)
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    manifest["sources"] = {"hash": "other"}
    (folders[0] / "manifest.json").write_text(json.dumps(manifest))
    summary = summary_of(folders)
    assert [cell["num_repeats"] for cell in summary["cells"]] == [1, 2, 1]
    assert len({cell["label"] for cell in summary["cells"]}) == 3


def test_a_cell_that_is_missing_in_a_round(tmp_path):
    folders = make_runs(tmp_path, [A, B, C], num_rounds=4, left_out={(1, 1), (0, 2)})
    summary = summary_of(folders)
    assert [cell["num_repeats"] for cell in summary["cells"]] == [3, 3, 4]
    repeats = {(entry["cell"], entry["metric"]): entry["repeats"] for entry in summary["verdicts"]}
    assert repeats["paged × continuous", "e2e_seconds"] == 2
    assert repeats["radix × continuous", "e2e_seconds"] == 3


def test_a_baseline_that_failed_in_every_round(tmp_path):
    folders = make_runs(tmp_path, [A, B, C], num_rounds=2, left_out={(0, 0), (0, 1)})
    summary = summary_of(folders)
    assert len(summary["cells"]) == 2
    assert all(entry["repeats"] == 2 for entry in summary["verdicts"])


def test_requests_with_one_token_have_no_tpot_to_compare(tmp_path):
    for index, allocator in enumerate(("contiguous", "paged")):
        fake_run(tmp_path / str(index), allocator, num_requests=8, one_token=True)
    summary = summary_of([tmp_path / "0", tmp_path / "1"])
    entry = summary["cells"][1]["paired"]["tpot_seconds"]
    assert (entry["verdict"], entry["ratio"], entry["requests"]["count"]) == (NO_PAIR, None, 0)
    printed(summary)


def test_company_in_many_runs_is_one_sentence(tmp_path):
    """A 2x2 of three rounds beside other work printed a paragraph with a clause for each of its twelve runs."""
    folders = make_runs(tmp_path, [A, B], num_rounds=3, probes=[1000.0, 1000.0])
    for number, folder in enumerate(folders):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["contention"]["steal_share"] = 0.1 + number / 100
        (folder / "manifest.json").write_text(json.dumps(manifest))
    [line] = [line for line in summary_of(folders)["notices"] if line.startswith("Not alone")]
    assert line == (
        "Not alone on the machine in 6 of 6 runs, and their times hold that too: stolen time in 6 (the worst: the "
        "hypervisor took 15.0 % of all processors' time). runs.csv has each."
    )
    [line] = [line for line in summary_of(folders[:2])["notices"] if line.startswith("Not alone")]
    assert line.count("the hypervisor took") == 2


def test_runs_are_not_called_cells_and_a_panel_says_how_long_its_own_run_took(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=3, probes=[1000.0, 1000.0])
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    assert summary["same_tokens"]["line"].startswith("All 6 runs gave the same tokens")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Of each cell its first run." in page
    assert "mean and percentiles are each run's own, averaged over the runs" in page
    runs = [(folder.name, run := read_run(folder), summarize(run)) for folder in folders]
    cells = contenders(make_cells(runs, None))
    with drawing():
        titles = [axes.get_title("left") for axes in memory_panels(cells).axes]
    own = [seconds(cell.runs[0].summary["duration_seconds"]) for cell in cells]
    assert [title.rsplit(": ", 1)[1] for title in titles] == own


def test_a_csv_has_no_empty_column_beside_those_of_its_parts(tmp_path):
    folders = make_runs(tmp_path, [A, B], num_rounds=2, probes=[1000.0, 1000.0])
    compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    for name in ("comparison.csv", "runs.csv"):
        names, *rows = csv.reader((tmp_path / "out" / name).read_text().splitlines())
        empty = {column for index, column in enumerate(names) if not any(row[index] for row in rows)}
        assert not [one for one in empty if any(other.startswith(f"{one}_") for other in names)], name


def test_seeds_are_named_and_not_averaged(tmp_path):
    """Three seeds folded into "seed 1.0", two into "seed 0.5"."""
    folders = make_runs(tmp_path, [A, B], seeds=(0, 1, 5), simulated=True)
    compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"\| Workload \| .*, seeds 0, 1, 5 \|", page)
    one = [folder for folder in folders if folder.name.startswith("paged")]
    compare([(folder.name, folder) for folder in one], tmp_path / "one")
    assert (tmp_path / "one" / "report.md").read_text().startswith("# 1 cell, 3 runs of one configuration")


def test_requests_with_the_same_tokens_are_counted_over_the_seeds(tmp_path):
    """Two seeds of four requests were "the same tokens (4 requests"."""
    one = summary_of(make_runs(tmp_path / "one", [A, B]))["same_tokens"]["line"]
    two = summary_of(make_runs(tmp_path / "two", [A, B], seeds=(0, 1)))["same_tokens"]["line"]
    assert one.startswith("All 2 cells gave the same tokens (10 requests, ")
    assert two.startswith("All 4 runs gave the same tokens (20 requests, ")


def test_a_wide_interval_leaves_room_for_the_names(tmp_path):
    """[0.0000074, 20,268] took the terminal's width, and "paged × continuous" went down in lines of four letters."""
    summary = summary_of(make_runs(tmp_path, [A, B], num_rounds=2))
    summary["cells"][1]["paired"]["e2e_seconds"]["interval"] = (7.4e-6, 20268.0)
    text = printed(summary, width=80)
    assert "[<0.01, >100]" in text
    assert "paged × continuous" in text
    assert interval((0.5, 20268.0), end_text) == "[0.50, >100]"
