"""Runs in MLflow and in an offline Weights & Biases, read back; a tracker that fails costs nothing but its record."""

import json
import math

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.cell_state import cell_key
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.studies.cells import CellRunner

CHOICES = {"allocator": "paged", "scheduler": "continuous", "workload": "fixed", "arrival": "all_at_once"}
RUN = [
    "runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed", "workload.num_requests=5",
    "report.progress=false",
]  # fmt: skip


def run(folder, *overrides, **more):
    folder.mkdir(exist_ok=True)
    return execute(compose_cell([*RUN, *overrides])[0], folder, "paged x continuous", CHOICES, **more)


def test_mlflow_keeps_settings_figures_ledger_and_report(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    uri = f"sqlite:///{tmp_path}/runs.db"
    options = ["tracking=mlflow", f"tracking.tracking_uri={uri}", "tracking.experiment=mine"]
    summary = run(tmp_path / "run", *options, group="my sweep")
    client = mlflow.MlflowClient(tracking_uri=uri)
    (kept,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["mlflow.runName"] == "paged x continuous"
    assert kept.data.tags["kvarena.group"] == "my sweep"
    assert kept.data.params["allocator.block_size"] == "16"
    assert kept.data.params["workload.num_requests"] == "5"
    assert kept.data.metrics["output_tokens_per_second"] == pytest.approx(summary["output_tokens_per_second"])
    assert kept.data.metrics["ttft_seconds.p99"] == pytest.approx(summary["ttft_seconds"]["p99"])
    points = client.get_metric_history(kept.info.run_id, "ledger/token_states")
    assert 2 < len(points) <= 200
    shares = [client.get_metric_history(kept.info.run_id, f"ledger/{name}")[3].value for name in
              ("token_states", "reservation", "internal", "external", "shortage", "cached", "free")]  # fmt: skip
    assert math.isclose(sum(shares), 1)
    assert {file.path for file in client.list_artifacts(kept.info.run_id)} == {"summary.json", "report.html"}
    # A finished cell is not logged again; the next one joins the same experiment.
    run(tmp_path / "run", *options, group="my sweep")
    CellRunner([*RUN, *options], tmp_path / "study").run("second")
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert sorted(one.data.tags["kvarena.group"] for one in runs) == sorted([str(tmp_path / "study"), "my sweep"])


def test_wandb_offline_leaves_the_record_in_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    summary = run(tmp_path / "run", "tracking=wandb", "report.pages=false", group="g")
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    raw = record.read_bytes()
    for text in (b"paged x continuous", b"allocator.block_size", b"ledger/token_states", b"output_tokens_per_second"):
        assert text in raw
    assert json.dumps(summary["output_tokens_per_second"]).encode() in raw


def test_a_tracker_that_fails_in_the_end_costs_a_warning(tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb")

    def broken(*_, **__):
        raise OSError("no space left\nat all")

    monkeypatch.setattr("wandb.init", broken)
    run(tmp_path / "run", "tracking=wandb", "report.pages=false")
    expected = f"warning: the tracker did not take the run (no space left); its files are in {tmp_path / 'run'}\n"
    assert capsys.readouterr().err == expected
    assert (tmp_path / "run" / "cell.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tracking=mlflow", "tracking.tracking_uri=http://127.0.0.1:9"],
            "tracking_uri=http://127.0.0.1:9 cannot be used",
        ),
        (["tracking=mlflow", "tracking.tracking_uri=nonsense://x"], "tracking_uri=nonsense://x cannot be used"),
        (["tracking=wandb", "tracking.mode=sometimes"], "tracking.mode=sometimes must be one of offline, online"),
    ],
)
def test_what_cannot_be_tracked_is_known_before_the_run(overrides, message, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match=message):
        run(tmp_path / "run", *overrides)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("kvarena.experiments.recording.tracking.find_spec", lambda _: None)
    with pytest.raises(Exception, match=rf"tracking={name} needs {name}: pip install 'kvarena\[tracking\]'") as caught:
        run(tmp_path / "run", f"tracking={name}")
    assert isinstance(caught.value.__cause__, ConfigError)


def test_where_a_run_is_kept_is_no_part_of_it():
    assert cell_key(*compose_cell([*RUN, "tracking=wandb"])) == cell_key(*compose_cell(RUN))
