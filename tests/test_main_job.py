"""The main job end to end: one command, a real model, all four crossings, one comparison, transformers' tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from engine.request import Request, SamplingParams
from experiments.reference import generate_static, load_reference

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = [
    "workload=lognormal",
    "workload.num_requests=10",
    "engine.max_model_len=256",
    "kv_cache.num_slots=1024",
    "report.progress=false",
]


def run(*args: str, cwd: Path) -> dict:
    command = [sys.executable, str(ROOT / "run.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("sweep")
    result = run("-m", "allocator=contiguous,paged", "scheduler=static,continuous", *WORKLOAD, cwd=cwd)
    assert result["failed"] == []
    return cwd / result["sweep_dir"]


def test_the_sweep_ends_in_one_comparison(sweep: Path):
    for name in ("report.html", "report.md", "summary.json", "comparison.csv"):
        assert (sweep / name).stat().st_size > 0
    text = (sweep / "report.md").read_text()
    for name in ("contiguous x static", "contiguous x continuous", "paged x static", "paged x continuous"):
        assert name in text


def test_a_run_folder_holds_what_its_docs_say(sweep: Path):
    for cell in map(str, range(4)):
        for name in ("report.html", "report.md", "summary.json", "requests.parquet", "steps.parquet", "manifest.json"):
            assert (sweep / cell / name).stat().st_size > 0
        steps = pd.read_parquet(sweep / cell / "steps.parquet")
        classes = steps[["token_states", "reservation", "internal", "external", "cached", "free"]]
        assert (classes.sum(axis=1) == steps["total"]).all()
        assert (classes >= 0).all().all()


def test_every_cell_gives_the_tokens_of_transformers_generate(sweep: Path):
    module = load_reference(str(ROOT / "models" / "demo"))
    first = pd.read_parquet(sweep / "0" / "requests.parquet")
    requests = [
        Request(row.request_id, row.prompt_token_ids.tolist(), SamplingParams(max_tokens=int(row.max_tokens)))
        for row in first.itertuples()
    ]
    expected = generate_static(module, requests, batch_size=1)
    for cell in map(str, range(4)):
        table = pd.read_parquet(sweep / cell / "requests.parquet")
        assert table["finish_reason"].tolist() == ["length"] * 10
        assert [ids.tolist() for ids in table["output_token_ids"]] == expected
    summary = json.loads((sweep / "summary.json").read_text())
    assert "same" in json.dumps(summary)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others(sweep: Path, tmp_path: Path):
    again = run("scheduler=continuous", *WORKLOAD, "workload.seed=1", cwd=tmp_path)
    prompts = [
        [ids.tolist() for ids in pd.read_parquet(folder / "requests.parquet")["prompt_token_ids"]]
        for folder in (sweep / "0", sweep / "3", tmp_path / again["run_dir"])
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]


def test_overlap_never_changes_tokens(sweep: Path, tmp_path: Path):
    result = run(*WORKLOAD, "engine.overlap=true", cwd=tmp_path)
    tables = [pd.read_parquet(folder / "requests.parquet") for folder in (sweep / "3", tmp_path / result["run_dir"])]
    outputs = [[ids.tolist() for ids in table["output_token_ids"]] for table in tables]
    assert outputs[0] == outputs[1]
