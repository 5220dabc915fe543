"""What is recorded of a run, what that costs, and a run of which nothing is recorded."""

import json
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

from kvarena.engine.contract import KVUsage, StepPlan
from kvarena.engine.core import StepOutput
from kvarena.engine.model_runner import StepResult
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.recording.kv_map import KVMapRecorder
from kvarena.experiments.recording.recording import Recording, recording_warning
from kvarena.experiments.settings.compose import compose_cell
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.terminal import run_table
from kvarena.reports.reading.errors import ReportError

SIMULATED = ("runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=auto", "workload=uniform",
             "workload.num_requests=12", "report.progress=false", "report.pages=false")  # fmt: skip


def run(folder, *overrides):
    folder.mkdir()
    cfg, choices = compose_cell([*SIMULATED, *overrides])
    return execute(cfg, folder, folder.name, choices)


def test_a_run_of_which_nothing_is_recorded_says_so_and_has_the_same_throughput(tmp_path):
    full, none = run(tmp_path / "full"), run(tmp_path / "none", "driver.record=none")
    assert sorted(path.name for path in (tmp_path / "none").iterdir() if path.suffix == ".parquet") == []
    for key in ("output_tokens_per_second", "duration_seconds", "num_requests", "num_finished", "num_rejected",
                "num_prompt_tokens", "num_output_tokens", "num_finished_output_tokens", "num_steps",
                "total_tokens_per_second", "requests_per_second"):  # fmt: skip
        assert none[key] == full[key], key
    assert set(none) == set(full)
    assert none["num_preemptions"] is none["kv_share_mean"] is none["batch_size_mean"] is None
    assert none["ttft_seconds"]["p50"] is none["kv_peak_owned_slots"] is none["itl_seconds"]["count"] is None
    assert none["recording"] == {"seconds": 0.0, "share": 0.0}
    assert any("Nothing was recorded" in line for line in none["notices"])
    assert none["processor_seconds"] > 0
    # Its report and its rows on the terminal are made of what is known.
    assert write_run_report(tmp_path / "none") == none
    assert "nothing else was recorded" in (tmp_path / "none" / "report.md").read_text()
    assert run_table(none).row_count == 3


def test_what_was_not_recorded_is_not_compared(tmp_path):
    for name, record in (("a", "full"), ("b", "none"), ("c", "full")):
        run(tmp_path / name, f"driver.record={record}")
    folders = [(name, tmp_path / name) for name in "abc"]
    summary = compare(folders, tmp_path / "comparison")
    assert [cell["folders"] for cell in summary["cells"]] == [["a", "c"]]
    assert any("recorded nothing" in line and "b (b)" in line for line in summary["notices"])
    with pytest.raises(ReportError, match="nothing to compare but their throughput: b \\(b\\): "):
        compare(folders[1:2], tmp_path / "comparison")


def test_totals_that_are_not_there_are_one_line(tmp_path):
    run(tmp_path / "none", "driver.record=none")
    path = tmp_path / "none" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["run"]["totals"]["duration"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ReportError, match=r"run\.totals lacks duration"):
        write_run_report(tmp_path / "none")


def test_a_summary_has_no_map_and_a_full_recording_has_one(tmp_path):
    for record in ("summary", "full"):
        run(tmp_path / record, f"driver.record={record}")
    assert not (tmp_path / "summary" / "kv_map.parquet").exists()
    assert (tmp_path / "full" / "kv_map.parquet").exists()


def test_a_simulation_states_the_processor_time_of_its_recording(tmp_path):
    summary = run(tmp_path / "full")
    recording = json.loads((tmp_path / "full" / "manifest.json").read_text())["run"]["recording"]
    assert 0 < recording["share"] < 1
    assert recording["seconds"] == pytest.approx(recording["share"] * summary["processor_seconds"])
    assert not any("Recording took" in line for line in summary["notices"])  # a virtual clock does not mind


class LoopEngine:
    """As much of an engine as a recording looks at."""

    ledger = on_launch = allocator = None
    clock = SimpleNamespace(now=lambda: 0.0)

    def __init__(self, overlap):
        self.overlap = overlap


def slow_recording(monkeypatch, wait_times, *, overlap):
    """The facts of a run that recorded 4 ms a step, after each of which the host waited so many seconds."""
    told = []
    recording = Recording(LoopEngine(overlap), level="summary", kv_map=False, measured=True)
    monkeypatch.setattr(recording._run, "on_step", lambda step: (told.append(step), time.sleep(0.004)))
    with recording:
        for wait_time in wait_times:
            recording.on_step(SimpleNamespace(wait_time=wait_time))
            time.sleep(0.001)
    assert len(told) == len(wait_times)
    assert 0.02 <= recording.facts()["recording"]["seconds"] <= recording._ended[0] - recording._began[0]
    return recording.facts()


@pytest.mark.parametrize(("overlap", "wait_time"), [(False, 0.01), (True, 0.0)])
def test_a_recording_that_takes_its_time_is_charged_for_it_and_warns(monkeypatch, overlap, wait_time):
    """The host had not to wait for the device, or the device waits for it in any case."""
    facts = slow_recording(monkeypatch, [wait_time] * 5, overlap=overlap)
    assert facts["recording"]["share"] > 0.01
    assert facts["recording"]["delaying_share"] == pytest.approx(facts["recording"]["share"])
    assert "held the device up for up to" in recording_warning(facts)
    assert recording_warning({"recording": {"seconds": 1.0, "share": 0.01, "delaying_share": 0.01}}) is None


def test_a_recording_beside_a_device_that_computes_says_that_it_held_nothing_up(monkeypatch):
    """Charged all the same; only what came after the last wait may have cost something."""
    facts = slow_recording(monkeypatch, [0.01] * 500, overlap=True)
    assert facts["recording"]["share"] > 0.1  # 4 ms against 1 ms, or what a busy machine makes of that
    assert facts["recording"]["delaying_share"] < 0.01
    assert "while the device computed" in recording_warning(facts)


class Pool:
    """An allocator without a request."""

    num_virtual_blocks, block_size, commits = 8, 4, False

    def cached_blocks(self):
        return ()


def launch(recorder, index, start):
    usage = KVUsage(32, 0, 0, 0, 0, 0, 32)
    times = {"start_time": start, "launch_time": start, "launched_time": start, "end_time": start}
    recorder.on_launch(StepOutput(index, StepPlan(), StepResult([]), [], usage, 0, 0, **times))


@pytest.mark.parametrize("num_steps", [1, 30, 401, 1041, 5000])
def test_snapshots_are_even_over_the_run(num_steps):
    recorder = KVMapRecorder(Pool(), lambda req: 0)
    for step in range(num_steps):
        launch(recorder, step, 0.0085 * step)
    times = [snapshot.time for snapshot in recorder._snapshots]
    assert min(200, num_steps) <= len(times) <= 400
    gaps = [b - a for a, b in pairwise(times)]
    assert not gaps or max(gaps) <= 2.01 * min(gaps)
    assert 0.0085 * (num_steps - 1) - times[-1] <= max(gaps, default=0.0)


def test_snapshots_cost_no_more_than_their_share(monkeypatch):
    """By a clock of its own: every look takes 1 ms of steps of 10 ms, and may take 2 %."""
    now = [0.0]
    monkeypatch.setattr("kvarena.experiments.recording.kv_map.time.perf_counter", lambda: now[0])
    recorder = KVMapRecorder(Pool(), lambda req: 0, max_share=0.02)
    look = recorder._look

    def slow_look(step):
        now[0] += 0.001
        return look(step)

    monkeypatch.setattr(recorder, "_look", slow_look)
    for step in range(1000):
        launch(recorder, step, now[0])
        now[0] += 0.010
    assert 0.015 <= 0.001 * len(recorder._snapshots) / now[0] <= 0.0202
