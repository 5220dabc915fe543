"""Per-request phases and the Chrome trace made from them."""

import itertools
import json

import numpy as np
import pytest
from fake_runs import fake_run

from kvarena.reports.drawing.chrome_trace import write_chrome_trace
from kvarena.reports.drawing.style import drawing
from kvarena.reports.drawing.timeline import MAX_ROWS, request_phases, timeline_figure, timeline_rows
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which requests were preempted."""
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "run"))


def test_phases_tile_a_request_from_arrival_to_finish(run):
    phases = [phase for phase in request_phases(run, np.arange(run.num_requests)) if phase.name != "preempted"]
    for row in range(2, run.num_requests):
        own = [phase for phase in phases if phase.row == row]
        assert own[0].start == run.requests["arrival_time"][row]
        assert own[-1].end == run.requests["finish_time"][row]
        for before, after in itertools.pairwise(own):
            assert before.end == after.start


def test_rejected_requests_have_no_phase(run):
    assert not request_phases(run, np.array([0, 1]))


def test_a_preempted_request_shows_its_longest_waits(run):
    row = int(np.argmax(run.requests["num_preemptions"]))
    preempted = [phase for phase in request_phases(run, np.array([row])) if phase.name == "preempted"]
    gaps = np.sort(np.diff(run.lists("token_times")[row].as_py()))[::-1]
    assert len(preempted) == run.requests["num_preemptions"][row] > 0
    longest = max(phase.end - phase.start for phase in preempted)
    assert longest == pytest.approx(gaps[0])


def test_many_requests_are_sampled_evenly(run):
    rows = timeline_rows(run)
    assert len(rows) == run.num_requests
    many = run.requests | {"arrival_time": np.arange(1000.0)}
    sampled = timeline_rows(type(run)(run.path, run.manifest, many, run.steps))
    assert len(sampled) == MAX_ROWS
    assert sampled[0] == 0 and sampled[-1] == 999


def test_figure_draws(run):
    with drawing():
        assert timeline_figure(run).axes


def test_chrome_trace(run, tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(run, path)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["name"].startswith("step ")]
    assert len(steps) == run.num_steps
    assert steps[3]["ts"] == pytest.approx(run.steps["launch_time"][3] * 1e6)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    counters = [event["args"] for event in events if event["name"] == "KV slots"]
    assert all(sum(split.values()) == 7680 for split in counters)
    assert {event["pid"] for event in events} == {1, 2}


def test_a_trace_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ReportError, match="cannot write"):
        write_chrome_trace(run, tmp_path / "a file" / "trace.json")
