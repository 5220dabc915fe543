"""The last line of stdout: at most 2 kB of JSON with what is asked for most; on a terminal a sentence with the same."""

import io
import json
from pathlib import Path

import pytest
from fake_runs import fake_run

from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.ending import MOST_BYTES, print_ending, run_ending, study_ending, sweep_ending
from kvarena.reports.pages.run_report import write_summary
from kvarena.reports.pages.study_claims import tally


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """A run, a sweep, a sweep of which nothing is left, and an experiment."""
    folder = tmp_path_factory.mktemp("ended")
    runs = [(name, fake_run(folder / name, name, num_requests=6)) for name in ("paged", "contiguous")]
    summary = write_summary(runs[0][1])
    compared = compare(runs, folder)
    left = [{"name": f"workload.seed={seed}", "folder": f"c{seed}", "error": "no room " * 50} for seed in range(300)]
    left_out = {"failed": left, "not_defined": left[:1], "unserved": left[:2]}
    study = {"experiment": "x", "headline": "h" * 3000, "simulated": True, "cells": ["a"], **tally([])}
    return {
        "run": run_ending(runs[0][1], summary),
        "sweep": sweep_ending(folder, compared, left_out, runs=["a"] * 300),
        "nothing": sweep_ending(folder, None, left_out),
        "study": study_ending(folder, study),
    }


@pytest.mark.parametrize("kind", ["run", "sweep", "nothing", "study"])
def test_the_line_is_short_and_whole(endings, kind):
    ending = endings[kind]
    line = ending.line()
    told = json.loads(line)
    assert len(line) < MOST_BYTES <= 2000 and line.isascii()
    key, folder = ending.place
    assert told[key] == str(folder)
    assert told["summary"] == (None if kind == "nothing" else str(folder / "summary.json"))
    assert {"report", "failed", "not_defined"} <= told.keys()
    numbers = [value for value in told.values() if isinstance(value, (int, float))]
    assert kind == "nothing" or len(numbers) >= 8
    if kind in ("sweep", "nothing"):  # what does not fit is still counted
        assert told["num_failed_cells"] == 300 > len(told["failed"]) >= 1
        assert told["not_defined"][0]["name"] == "workload.seed=0"


def test_full_is_all_of_it(endings):
    run, sweep = json.loads(endings["run"].line(full=True)), json.loads(endings["sweep"].line(full=True))
    assert run["summary"]["itl_seconds"]["p99"] == run["itl_seconds_p99"]
    assert len(sweep["failed"]) == len(sweep["runs"]) == 300
    assert sweep["summary"]["cells"][0]["label"]


def test_a_terminal_gets_a_sentence_with_the_same(endings):
    for kind, words in {
        "run": ("4 of 6 requests", "2 rejected", "output tokens/s", "first token after"),
        "sweep": ("2 cells in 2 runs", "300 failed (workload.seed=0, ", " and 297 more)", "1 not defined"),
        "study": ("0 claims: 0 judged, 0 hold, 0 not comparable",),
    }.items():
        stream = Terminal()
        print_ending(endings[kind], file=stream)
        text = stream.getvalue()
        assert text.count("\n") == 1 and text.endswith("summary.json\n")
        assert all(word in text for word in words), text
        print_ending(endings[kind], full=True, file=stream)
        assert json.loads(stream.getvalue().splitlines()[1])
        print_ending(endings[kind], file=(plain := io.StringIO()))
        assert json.loads(plain.getvalue())["failed"] is not None


def test_a_path_is_never_cut(endings):
    long = Path("/" + "/".join(["x" * 200] * 15))
    assert json.loads(run_ending(long, endings["run"].summary).line())["run_dir"] == str(long)
