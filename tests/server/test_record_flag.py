"""`--record DIR`: what was served is a run, for reports, checks and replays; ended, killed, or of two engines."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from server_harness import KEY, PATIENCE, RunningServer

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.correctness import map_check, verify
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.settings.compose import compose_cell, load_run
from kvarena.experiments.workloads.recorded import RecordedWorkload
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.files import read_run

SMALL = ("--max-model-len", "512", "--num-gpu-blocks-override", "128")
SHARED = [70 + i for i in range(40)]


def manifest_in(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def end_in(folder: Path) -> str | None:
    """How the recording stands; None while its files are being replaced."""
    try:
        return manifest_in(folder)["recording"]["end"]
    except FileNotFoundError:
        return None


def test_what_was_served_is_a_run_and_can_be_replayed(tmp_path, capsys):
    folder = tmp_path / "served"
    server = RunningServer(*SMALL, "--record", str(folder))
    try:
        assert "token ids of prompts and outputs" in server.log and server.metrics()["kvarena:recording_up"] == 1
        answers = [
            server.complete(
                [*SHARED, 30 + i], max_tokens=12 + i, ignore_eos=True, return_token_ids=True, user=f"u{i % 2}"
            )
            for i in range(5)
        ]
        # The next turn's prompt holds the answer before.
        said = [*SHARED, 30, *answers[0].json()["choices"][0]["token_ids"], *range(40, 60)]
        answers.append(server.complete(said, max_tokens=9, ignore_eos=True, return_token_ids=True))
        text = answers[-1].json()["choices"][0]["text"]
        stopped = server.complete(said, max_tokens=200, ignore_eos=True, stop=text[2:5])
        assert stopped.json()["choices"][0]["finish_reason"] == "stop"
        with server.client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": [20] * 8, "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0},
        ) as response:
            next(response.iter_lines())
        server.wait_idle()
    finally:
        assert server.stop() == 0
    assert "ERROR" not in server.said
    manifest, run = manifest_in(folder), read_run(folder)
    assert KEY not in (folder / "manifest.json").read_text() and "server" not in manifest["config"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*.parquet")} == {0o600}
    assert manifest["recording"]["end"] == "orderly" and not manifest["recording"]["num_not_greedy"]
    rows = pq.read_table(folder / "requests.parquet").to_pylist()
    assert [row["finish_reason"] for row in rows] == ["length"] * 6 + ["stop", "abort"]
    for answer, row in zip(answers, rows, strict=False):
        assert row["output_token_ids"] == answer.json()["choices"][0]["token_ids"] and row["error"] == ""
        assert row["num_cached_tokens"] == answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert [row["client_id"] for row in rows[:5]] == ["u0", "u1", "u0", "u1", "u0"]
    assert rows[5]["num_cached_tokens"] >= 48 > rows[1]["num_cached_tokens"] == 32
    assert 0 < manifest["run"]["recording"]["share"] < 1 and run.num_steps == manifest["run"]["num_steps"]
    assert write_run_report(folder)["num_finished"] == 7
    assert map_check.main([str(folder)]) == 0 and verify.main([str(folder)]) == 0
    # The manifest's command replays it; so do other strategies, and the simulator.
    assert manifest["command"][:2] == ["python", "run.py"]
    shares = [int(row["num_cached_tokens"]) for row in rows]
    for name, overrides in (("same", ()), ("simulated", ("runner=simulated", "engine.dtype=bfloat16"))):
        (tmp_path / name).mkdir()
        config, choices = compose_cell(
            [*manifest["command"][2:], "report.pages=false", "report.progress=false", *overrides]
        )
        execute(config, tmp_path / name, name, choices)
        again = pq.read_table(tmp_path / name / "requests.parquet").to_pylist()
        assert [row["num_cached_tokens"] for row in again] == shares
        assert [row["output_token_ids"] for row in again] == [row["output_token_ids"] for row in rows]


def test_killed_engines_leave_what_they_had_recorded_and_nobody_can_read_it(tmp_path):
    folder = tmp_path / "served"
    server = RunningServer(*SMALL, "-dp", "2", "--router", "round_robin", "--record", str(folder), "--record-content",
                           "hashes")  # fmt: skip
    folders = [folder / f"engine-{rank}" for rank in range(2)]
    try:
        for i in range(4):
            assert server.complete([*SHARED, 30 + i], max_tokens=6, ignore_eos=True, user="somebody").status_code == 200
        deadline = time.monotonic() + PATIENCE
        while not all((one / "manifest.json").exists() for one in folders):
            assert time.monotonic() < deadline, server.log
            time.sleep(0.05)
    finally:
        for process in [*server.parts(), server.process]:
            os.kill(process.pid, signal.SIGKILL)
        server.process.wait(PATIENCE)
    while any(end_in(one) != "cut off" for one in folders):
        assert time.monotonic() < deadline + PATIENCE
        time.sleep(0.05)
    for one in folders:
        assert read_run(one).num_requests == 2 and b"somebody" not in (one / "requests.parquet").read_bytes()
        rows = pq.read_table(one / "requests.parquet").to_pylist()
        assert all(row["prompt_token_ids"] is None and row["output_token_ids"] is None for row in rows)
        assert len({row["client_id"] for row in rows}) == 1 and rows[0]["client_id"].startswith("client-")
    items = RecordedWorkload(path=str(folder), seed=0, vocab_size=500).items()
    assert [len(item.prompt_token_ids) for item in items] == [41] * 4
    assert len({tuple(item.prompt_token_ids[:32]) for item in items}) == 1  # over both engines
    assert len({tuple(item.prompt_token_ids) for item in items}) == 4
    assert [item.arrival_time for item in items] == sorted(item.arrival_time for item in items)


def test_flags_of_a_recording():
    flags = [
        "models/demo",
        "--record",
        "DIR",
        "--record-mib",
        "64",
        "--record-minutes",
        "5",
        "--record-content",
        "hashes",
    ]
    server = load_run(overrides_of(parse_flags(flags))).server
    assert isinstance(server, ServerConfig)
    found = (server.record, server.record_mib, server.record_minutes, server.record_content)
    assert found == ("DIR", 64.0, 5.0, "hashes")


@pytest.mark.parametrize("flags", [("--record-mib", "0"), ("--record-minutes", "-1"), ("--record", "")])
def test_wrong_bounds_are_refused(flags):
    with pytest.raises(ConfigError, match=r"server\.record"):
        load_run(overrides_of(parse_flags(["models/demo", *flags])))
