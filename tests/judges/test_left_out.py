"""What is left out of vLLM's tests is named, each with its reason, and files that are run exist once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def test_each_line_has_a_pattern_of_one_file_or_test_and_a_reason():
    lines = [line for line in (HERE / "left_out.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
    lines = [line for line in lines if line]
    rows = [line.split("  ", 1) for line in lines]
    assert all(len(row) == 2 and row[1].strip() for row in rows)
    assert len({pattern for pattern, _ in rows}) == len(rows) > 20
    assert all(pattern.count("::") == 1 or pattern.startswith("*[") for pattern, _ in rows)


def test_a_file_is_in_one_group_and_its_weights_are_known():
    spec = importlib.util.spec_from_file_location("run_vllm", HERE / "run_vllm.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    files = [file for files in run.GROUPS.values() for file in files]
    assert len(set(files)) == len(files)
    assert set(run.THINKING) <= set(files)
    rows = [
        {"test": f"{files[0]}::test_a", "result": "passed", "why": ""},
        {"test": f"{files[0]}::test_b", "result": "skipped", "why": ""},
        {"test": f"{files[-1]}::test_c", "result": "left out", "why": "x"},
    ]
    lines = run.table(rows).splitlines()
    assert lines[1].split() == ["completions", "1", "1", "0"]
    assert lines[-1].split()[-3:] == ["0", "0", "1"]
