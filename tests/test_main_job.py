"""The main job end to end: one command, a real model, all four crossings, one comparison, transformers' tokens."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import warm
from hydra import compose, initialize_config_dir
from hydra.core.utils import configure_log

from kvarena.experiments.correctness import verify
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = [
    "workload=uniform",
    "workload.num_requests=10",
    "workload.prompt_len.max=64",
    "workload.output_len.max=32",
    "engine.max_model_len=128",
    "kv_cache.num_slots=512",
    "report.progress=false",
    "driver.probe=false",
]


def run(*args: str, cwd: Path, is_fresh: bool) -> dict:
    command = [str(ROOT / "run.py"), *args]
    if is_fresh:
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250, check=False)
    else:
        done = warm.run(command, cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_here(folder: Path, *args: str) -> Path:
    """One cell in this process, which saves the imports of another one."""
    cfg, choices = compose_cell([*args, *WORKLOAD, "report.pages=false"])
    execute(cfg, folder, "cell", choices)
    return folder


def cells(sweep: Path) -> list[Path]:
    """The sweep's run folders, in the grid's order."""
    return [sweep / name for name in json.loads((sweep / "sweep.json").read_text())["runs"]]


@pytest.fixture(scope="module", params=["warm", pytest.param("fresh", marks=pytest.mark.slow)])
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a warm process that draws nothing; in an interpreter of its own, with all figures, in `make test-all`."""
    cwd = tmp_path_factory.mktemp("sweep")
    result = run("-m", "allocator=contiguous,paged", "scheduler=static,continuous", *WORKLOAD, cwd=cwd,
                 is_fresh=request.param == "fresh")  # fmt: skip
    assert result["failed"] == []
    return cwd / result["sweep_dir"]


def test_the_sweep_ends_in_one_comparison(sweep: Path):
    for name in ("report.html", "report.md", "summary.json", "comparison.csv"):
        assert (sweep / name).stat().st_size > 0
    text = (sweep / "report.md").read_text()
    for name in ("contiguous × static", "contiguous × continuous", "paged × static", "paged × continuous"):
        assert name in text


def test_a_run_folder_holds_what_its_docs_say(sweep: Path):
    for cell in cells(sweep):
        for name in ("report.html", "report.md", "summary.json", "requests.parquet", "steps.parquet", "manifest.json"):
            assert (cell / name).stat().st_size > 0
        steps = pd.read_parquet(cell / "steps.parquet")
        classes = steps[["token_states", "reservation", "internal", "external", "shortage", "cached", "free"]]
        assert (classes.sum(axis=1) == steps["total"]).all()
        assert (classes >= 0).all().all()


def test_every_cell_gives_the_tokens_of_transformers_generate(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert verify.main([*map(str, cells(sweep)), "--batch-size", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["requests"], line["differing"]) for line in lines] == [(10, [])] * 4
    assert "same tokens" in (sweep / "report.md").read_text()


def test_a_wrong_token_is_found(sweep: Path, tmp_path: Path):
    shutil.copytree(cells(sweep)[3], tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / "requests.parquet")
    table["output_token_ids"] = [ids + (row == 4) for row, ids in enumerate(table["output_token_ids"])]
    table.to_parquet(tmp_path / "run" / "requests.parquet")
    assert verify.main([str(tmp_path / "run"), "--batch-size", "1"]) == 1


def test_the_same_seed_gives_the_same_requests_and_another_seed_others(sweep: Path, tmp_path: Path):
    other = run_here(tmp_path, "scheduler=continuous", "workload.seed=1")
    prompts = [
        [ids.tolist() for ids in pd.read_parquet(folder / "requests.parquet")["prompt_token_ids"]]
        for folder in (cells(sweep)[0], cells(sweep)[3], other)
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]


def test_overlap_never_changes_tokens(sweep: Path, tmp_path: Path):
    overlapped = run_here(tmp_path, "engine.overlap=true")
    tables = [pd.read_parquet(folder / "requests.parquet") for folder in (cells(sweep)[3], overlapped)]
    outputs = [[ids.tolist() for ids in table["output_token_ids"]] for table in tables]
    assert outputs[0] == outputs[1]


def test_a_run_lets_the_engine_warn():
    """Hydra's `disabled` logging switches every logger off that exists: no warning of a model was ever seen."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        hydra = compose("config", return_hydra_config=True).hydra
    for settings in (hydra.hydra_logging, hydra.job_logging):
        configure_log(settings)
    assert not logging.getLogger("kvarena.engine.models.loader").disabled
    assert logging.getLogger("kvarena.engine.models.loader").isEnabledFor(logging.WARNING)
