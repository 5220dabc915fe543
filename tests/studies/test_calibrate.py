"""The calibration finds again what timed its runs, and says so where it does not."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import model_sizes
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.compose import compose_cell, load_config
from kvarena.experiments.simulation.fit import Samples, fit_profile, most_launch_tokens, predict, samples
from kvarena.experiments.simulation.profiles import load_profile, write_profile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.recordings import write_recording
from kvarena.experiments.studies.base import Findings
from kvarena.experiments.studies.calibrate import METRICS, CalibrateStudy
from kvarena.experiments.studies.cells import CellRunner
from kvarena.reports.pages.run_report import read_summary

# The recorded machine is a simulated one, so its step times are known.
MACHINE = ["model=llama-3.1-8b-shape", "engine.dtype=auto", "runner=simulated", "runner.profile=h200"]
CELL = [
    "workload=uniform",
    "workload.num_requests=60",
    "kv_cache.num_slots=8192",
    "report.progress=false",
    "report.pages=false",
]
LOADS = {"once": ["arrival=all_at_once"], "poisson": ["arrival=poisson", "arrival.rate=20"]}


def record(folder: Path, seed: int, *overrides: str) -> str:
    folder.mkdir(parents=True)
    cfg, choices = compose_cell([*MACHINE, *CELL, f"workload.seed={seed}", *overrides])
    execute(cfg, folder, "cell", choices)
    return str(folder)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    root = tmp_path_factory.mktemp("recorded")
    return {seed: [record(root / f"{name}-{seed}", seed, *load) for name, load in LOADS.items()] for seed in (0, 1)}


@pytest.fixture(scope="module")
def findings(recorded: dict[int, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path]:
    out = tmp_path_factory.mktemp("study")
    return CalibrateStudy(recorded[0], recorded[1]).run(CellRunner([], out)), out


def test_a_known_machine_is_found_again(findings: tuple[Findings, Path]):
    found, out = findings
    # Where arrivals set the throughput it judges nothing.
    paced = ["not comparable", *["passes"] * len(METRICS)]
    assert [claim.verdict for claim in found.claims] == [*["passes"] * (len(METRICS) + 1), *paced]
    assert found.headline.startswith("9 of 9 bars are met in 2 held-out cells")
    # p99 TTFT is 3.9 % off, where the bar is 8 %; why the fit misses it by more than the others was not looked into.
    for claim in found.claims:
        assert claim.ours < (4.0 if "p99 TTFT" in claim.quantity else 2.0), claim
    profile = load_profile(str(out / "profiles" / "llama-3.1-8b-shape-plain.yaml"))
    truth = load_profile("h200")
    assert profile.host.after == pytest.approx(truth.host.after, rel=0.01)
    assert profile.host.after_per_request == pytest.approx(truth.host.after_per_request, rel=0.01)
    # Without overlap what the host does after the launch is part of the device's time.
    step = StepFeatures(0, 8, 4000, 0, 0, 0)
    sizes = model_sizes(shape=OmegaConf.to_container(load_config(MACHINE).model.shape), dtype="auto")
    expected = truth.step_time(sizes, 16)(step) + truth.host.before + 8 * truth.host.before_per_request
    assert profile.device(step) == pytest.approx(expected, rel=0.01)


def test_the_profile_of_a_study_runs_other_workloads(findings: tuple[Findings, Path], tmp_path: Path):
    profile = findings[1] / "profiles" / "llama-3.1-8b-shape-plain.yaml"
    record(tmp_path / "run", 7, f"runner.profile={profile}")
    with pytest.raises(ConfigError, match=r"measured with engine\.overlap=false"):
        record(tmp_path / "other", 7, f"runner.profile={profile}", "engine.overlap=true")


def test_a_slower_machine_is_seen(recorded: dict[int, list[str]], tmp_path: Path):
    slow = record(tmp_path / "slow", 1, *LOADS["once"], "runner.profile=a100-40gb")
    found = CalibrateStudy(recorded[0], [slow]).run(CellRunner([], tmp_path / "study"))
    assert [claim.verdict for claim in found.claims] == [*["fails"] * len(METRICS), "passes"]


def test_pauses_do_not_move_the_fit(recorded: dict[int, list[str]]):
    runs = [RecordedRun.read(folder) for folder in recorded[0]]
    clean = samples(runs[0])
    expected = fit_profile(runs).profile.decode.seconds[-1]
    # A pause of 50 ms in one step of a hundred, as a machine with other work has them.
    for run in runs:
        steps = run.steps
        pauses = np.where(np.arange(len(steps["step"])) % 100 == 50, 0.05, 0.0)
        steps["end_time"] = steps["end_time"] + np.cumsum(pauses)
        for name in ("start_time", "launch_time"):
            steps[name] = steps[name] + np.cumsum(pauses) - pauses
    profile = fit_profile(runs).profile
    assert samples(runs[0]).device.max() > 0.05
    assert profile.decode.seconds[-1] == pytest.approx(expected, rel=0.01)
    decodes = clean.take(clean.features[:, 5] == 0)
    assert predict(profile, decodes).mean() == pytest.approx(decodes.device.mean(), rel=0.01)


FITTED = """
fitted:
  {schedulers: [continuous 2048], workloads: [uniform], num_steps: 1, decode_requests: 256, decode_kv_tokens: 65536,
   prefill_tokens: 2048, prefill_requests: 256, prefill_decodes: 256, prefill_kv_tokens: 65536, longest_prefill: 2048}
"""
OVERLAPPED = f"""
kind: measured
source: a law to be found again
error: none
{FITTED}
model: llama-3.1-8b-shape
kv_bytes_per_token: 131072
overlap: true
decode: {{tokens: [1, 60], seconds: [5.0e-3, 6.0e-3]}}
prefill: {{tokens: [1, 1000], seconds: [5.0e-3, 20.0e-3]}}
host:
  {{after: 2.0e-4, launch_decode: 5.0e-4, launch_prefill: 8.0e-4, launch_eager: 9.0e-3,
   max_launch_tokens: 373}}
"""


@pytest.mark.parametrize(("launches", "most"), (
    ([0.387, *[0.027] * 30], 0.0),  # one that compiled, then eager ones alone
    ([0.003] * 8 + [0.3] + [0.027] * 30, 108.0),
))  # fmt: skip
def test_replays_are_told_by_groups_that_are_faster(launches, most):
    count = len(launches)
    features = np.zeros((count, 8))
    features[:, 0], features[:, 5] = np.arange(101, 101 + count), 1
    nothing = np.zeros(count)
    steps = Samples(features, nothing, np.array(launches), nothing, nothing, nothing, nothing)
    assert most_launch_tokens(steps) == most


def test_launches_that_the_device_does_not_hide_are_found_again(tmp_path: Path):
    law = tmp_path / "law.yaml"
    law.write_text(OVERLAPPED)
    # Prompts of up to 600 tokens: a launch takes less than a decode step for most, and more for some.
    cell = ["engine.overlap=true", f"runner.profile={law}", "workload.prompt_len.max=600", "kv_cache.num_slots=65536"]
    runs = {
        seed: [record(tmp_path / f"{name}-{seed}", seed, *cell, *load) for name, load in LOADS.items()]
        for seed in (0, 1)
    }
    found = CalibrateStudy(runs[0], runs[1]).run(CellRunner([], tmp_path / "study"))
    assert max(claim.ours for claim in found.claims) < 2.0
    fitted = load_profile(str(tmp_path / "study" / "profiles" / "llama-3.1-8b-shape-overlap.yaml"))
    truth = load_profile(str(law))
    for name in ("after", "launch_decode", "launch_prefill", "launch_eager"):
        assert getattr(fitted.host, name) == pytest.approx(getattr(truth.host, name), rel=0.01), name
    assert 300 < fitted.host.max_launch_tokens <= 373
    # As long as it takes, also where the end of the step before was seen late.
    steps = [samples(RecordedRun.read(folder)) for folder in runs[0]]
    assert sum(np.isnan(part.device).sum() for part in steps) > 20
    for step in (StepFeatures(0, 8, 4000, 0, 0, 0), StepFeatures(500, 4, 2000, 125_000, 0, 1)):
        assert fitted.device(step) == pytest.approx(truth.device(step), rel=0.02)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([], [0], "study.train is empty"), ([0], [], "study.test is empty"), ([0], [0], "cannot judge its own fit")],
)
def test_bad_lists_are_one_line(train: list[int], test: list[int], message: str, recorded: dict[int, list[str]]):
    def folders(seeds: list[int]) -> list[str]:
        return [folder for seed in seeds for folder in recorded[seed]]

    with pytest.raises(ConfigError, match=message):
        CalibrateStudy(folders(train), folders(test))


def test_both_lists_and_recordings_are_one_line(recorded: dict[int, list[str]], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"study\.recordings stands for"):
        CalibrateStudy(recorded[0], recorded[1], str(tmp_path))
    with pytest.raises(ConfigError, match="holds no recordings"):
        CalibrateStudy(recordings=str(tmp_path))


def test_recordings_say_themselves_what_is_fitted_and_what_judges(
    recorded: dict[int, list[str]], findings: tuple[Findings, Path], tmp_path: Path
):
    cells = []
    for part, seed in (("fit", 0), ("held-out", 1)):
        for folder in recorded[seed]:
            run = RecordedRun.read(folder)
            manifest = run.manifest | {"name": f"cell{len(cells)}", "calibration": {"part": part, "load": None}}
            cells.append({"manifest": manifest, "requests": run.requests, "steps": run.steps})
    write_recording(cells, tmp_path, "simulated")
    found = CalibrateStudy(recordings=str(tmp_path)).run(CellRunner([], tmp_path / "study"))
    # Times in whole nanoseconds: the same to many digits.
    expected = [claim.ours for claim in findings[0].claims]
    assert [claim.ours for claim in found.claims] == pytest.approx(expected, abs=1e-3)
    profile = load_profile(str(tmp_path / "study" / "profiles" / "llama-3.1-8b-shape-plain.yaml"))
    assert "over 2 held-out cells" in profile.error
    assert profile.fitted.schedulers == ["continuous 2048"]


def test_chunks_beside_decodes_cost_what_physics_says_after_a_fit_to_prompts_alone(
    recorded: dict[int, list[str]], tmp_path: Path
):
    """Of prompts alone, tokens, KV read and context are one number: the fit once gave all of it to the KV."""
    profile = fit_profile([RecordedRun.read(folder) for folder in recorded[0]]).profile
    assert profile.prefill.per_kv_token == profile.decode.per_kv_token
    write_profile(profile, tmp_path / "fitted.yaml")
    chunked = ["scheduler=chunked", "kv_cache.num_slots=65536", "workload.num_requests=100"]
    tpots = {}
    for name, given in (("law", "h200"), ("fitted", tmp_path / "fitted.yaml")):
        folder = Path(record(tmp_path / name, 3, *chunked, f"runner.profile={given}"))
        tpots[name] = read_summary(folder)["tpot_seconds"]["mean"]
        outside = json.loads((folder / "manifest.json").read_text())["simulation"].get("outside", [])
        assert bool(outside) is (name == "fitted")
    assert tpots["fitted"] == pytest.approx(tpots["law"], rel=0.05)


def test_a_run_outside_of_what_was_fitted_says_so_first(
    findings: tuple[Findings, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    profile = findings[1] / "profiles" / "llama-3.1-8b-shape-plain.yaml"
    inside = Path(record(tmp_path / "inside", 0, f"runner.profile={profile}"))
    [simulated] = read_summary(inside)["notices"]
    assert simulated.startswith("Simulated: ")
    many = [
        "workload.num_requests=200",
        "kv_cache.num_slots=65536",
        "scheduler=chunked",
        "report.pages=true",
        "report.kv_map=false",
    ]
    outside = Path(record(tmp_path / "outside", 0, f"runner.profile={profile}", *many))
    line, simulated = read_summary(outside)["notices"]
    assert simulated.startswith("Simulated: ")
    assert line.startswith("Outside what its profile was fitted to: ")
    assert "requests that decode in steps with prompts where the largest fitted step has 0" in line
    assert f"warning: cell: {line}" in capsys.readouterr().err
    report = (outside / "report.md").read_text()
    assert 0 < report.index(line) < report.index("## ")
