"""Bad input to run.py gets one line on stderr that says what to change, a non-zero exit code and no stack trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *args, "report.progress=false"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def broken_checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", ')
    return directory


CASES = {
    "unknown key": (["allocator.blok_size=8"], "allocator.block_size"),
    "unknown section": (["nonsense=1"], "nonsense"),
    "unknown strategy": (["allocator=nonsense"], "Available options in 'allocator'"),
    "not a number": (["engine.max_model_len=long"], "engine.max_model_len"),
    "negative": (["scheduler.max_num_seqs=-1"], "max_num_seqs"),
    "missing model": (["model.path=/nowhere/at/all"], "/nowhere/at/all"),
    "pool too small": (["kv_cache.num_slots=3"], "kv_cache.num_slots"),
    "memory too small": (["kv_cache.memory_gib=0.0000001"], "kv_cache.memory_gib"),
    "two sizes": (["kv_cache.num_blocks=4", "kv_cache.memory_gib=1"], "give one of them"),
    "missing trace": (["workload=azure_trace", "workload.path=/nowhere.csv"], "/nowhere.csv"),
    "zero requests": (["workload.num_requests=0"], "num_requests"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_settings(name: str, tmp_path: Path):
    args, expected = CASES[name]
    done = run(*args, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]


def test_a_broken_model_directory(tmp_path: Path):
    done = run(f"model.path={broken_checkpoint(tmp_path)}", cwd=tmp_path)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_negative_length_in_a_trace_names_file_line_and_column(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,-4,10\r\n")
    done = run("workload=azure_trace", f"workload.path={trace}", cwd=tmp_path)
    assert done.returncode == 2
    assert "trace.csv" in done.stderr
    assert "line 2" in done.stderr
    assert "ContextTokens" in done.stderr


def test_a_failed_cell_does_not_stop_a_sweep(tmp_path: Path):
    # orca_max reserves more than this pool holds for a single request; paged does not.
    common = ["workload=fixed", "workload.num_requests=4", "workload.prompt_len=8", "workload.output_len=4"]
    done = run("-m", "kv_cache.num_slots=1,512", *common, cwd=tmp_path)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(last["failed"]) == 1
    assert "kv_cache.num_slots" in last["failed"][0]["error"]
    assert Path(tmp_path, last["report"]).exists()
